"""Listings from announcement to what BuildKit is told and reads."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from offload_builder.buildkit.statframes import read_frames
from offload_builder.node.localsource import ReplayedTree
from offload_core.errors import ContextError, NodeLostError, UsageError
from offload_proto.v1.node_service_pb2 import ContextListing, InlineFile
from tests.fixtures.buildcontext import ContextProject, entries_of, read_all
from tests.fixtures.listings import (
    EncodedPage,
    Node,
    deep,
    encoded,
    file,
    hardlink,
    ordered,
    with_parents,
)

MANY = deep(f"src/m{number // 100}/f{number:04}" for number in range(1000))


@pytest.fixture
async def project(tmp_path):
    async with ContextProject(tmp_path) as made:
        yield made


def later(tree, seconds: int = 1000):
    return {
        path: Node(node.content, node.mode, node.modified_at_ns + seconds * 10**9, node.link)
        for path, node in tree.items()
    }


async def test_a_new_listing_is_told_in_order_with_the_times_of_the_client(project):
    build = project.build(context=MANY)
    told = await build.told()
    assert list(told) == ordered(MANY)
    assert all(told[path].modified_at_ns == MANY[path].modified_at_ns for path in MANY)
    assert (build.stats.context_files, build.stats.context_bytes) == (
        1000, sum(len(node.content or b"") for node in MANY.values()),
    )  # fmt: skip
    assert build.client.asked_pages == len(encoded(MANY))


async def test_a_fresh_checkout_sends_no_page_and_no_time(project):
    first = await project.build(context=MANY).told()
    build = project.build(context=later(MANY))
    assert await build.told() == first
    assert (build.client.asked_pages, build.client.asked_times) == (0, 0)
    assert build.stats.context_files == 1000


async def test_one_changed_file_sends_one_page(project):
    first = await project.build(context=MANY).told()
    path = "src/m3/f0342"
    build = project.build(context={**later(MANY), path: file(b"other")})
    told = await build.told()
    assert (build.client.asked_pages, build.client.asked_times) == (1, 0)
    assert {name for name in told if told[name] != first[name]} == {path}


async def test_pages_of_another_key_send_only_their_times(project):
    await project.build(context=MANY).told()
    other = later(MANY)
    build = project.build(other=other)
    told = await build.told("other")
    assert (build.client.asked_pages, build.client.asked_times) == (0, len(encoded(MANY)))
    assert all(told[path].modified_at_ns == other[path].modified_at_ns for path in other)


async def test_content_is_asked_for_by_entry_and_read(project):
    build = project.build(context=MANY)
    tree = await build.context.open("context", [], [], [])
    told = list(await entries_of(tree))
    wanted = [told.index("src/m3/f0342"), told.index("src/m9/f0999"), told.index("src/m3/f0343")]
    sizes = [tree.content_size(index) for index in (*wanted, told.index("src"), 10**6)]
    assert sizes == [12, 12, 12, -1, -1]
    await tree.requested(wanted)
    assert [await read_all(tree, index) for index in wanted] == [
        b"src/m3/f0342", b"src/m9/f0999", b"src/m3/f0343",
    ]  # fmt: skip
    assert sorted(build.client.asked_entries) == ["src/m3/f0342", "src/m3/f0343", "src/m9/f0999"]
    await tree.delivered()
    await tree.close()
    # The teammate's client is not asked for them.
    other = project.build(context=later(MANY))
    tree = await other.context.open("context", [], [], [])
    await entries_of(tree)
    await tree.requested(wanted)
    assert await read_all(tree, wanted[0]) == b"src/m3/f0342"
    assert other.client.asked_entries == []
    await tree.close()


async def test_empty_files_and_links_have_no_content_to_wait_for(project):
    tree_ = {"a": file(b""), "b": file(b"x"), "c": hardlink("b")}
    build = project.build(context=tree_)
    tree = await build.context.open("context", [], [], [])
    await entries_of(tree)
    assert [tree.content_size(index) for index in range(3)] == [0, 1, -1]
    await tree.requested([0])
    assert await read_all(tree, 0) == b""
    assert build.client.asked_entries == []
    await tree.close()


async def test_second_reading_tells_the_same_although_client_and_memory_have_gone_on(project):
    build = project.build(context=MANY)
    first = await build.told()
    closed: list[str] = []

    async def replayed() -> None:
        closed.append("closed")

    build.context.on_replayed = replayed
    changed = {path: file(b"new") if node.content else node for path, node in MANY.items()}
    await project.build(context=changed).told()
    build.link.lose(NodeLostError("the client went away"))
    build.content.lose(NodeLostError("the client went away"))
    tree = await build.context.open("context", [], [], [])
    assert isinstance(tree, ReplayedTree)
    assert await entries_of(tree) == first
    await tree.delivered()
    assert closed == []
    await tree.close()
    assert closed == ["closed"]
    # What was not told by then is not lost either.
    last = await project.build(context=later(changed)).told()
    assert all(last[p].modified_at_ns > first[p].modified_at_ns for p in MANY if MANY[p].content)


async def test_two_readings_at_once_share_one_listing(project):
    build = project.build(context=MANY)
    one, two = await asyncio.gather(build.told(), build.told())
    assert one == two
    assert build.client.requests == ["context"]


async def test_a_listing_that_was_given_up_is_asked_for_again_under_another_generation(project):
    build = project.build(context=MANY)
    build.client.per_message = 1
    tree = await build.context.open("context", [], [], [])
    async for _ in tree.runs():
        break
    await tree.close()
    assert f"k-{project.times.generation('k')}" != build.key
    told = await build.told()
    assert list(told) == ordered(MANY)
    assert build.client.requests == ["context", "context"]


async def test_an_unchanged_listing_that_was_given_up_keeps_the_generation(project):
    await project.build(context=MANY).told()
    build = project.build(context=later(MANY))
    tree = await build.context.open("context", [], [], [])
    async for _ in tree.runs():
        break
    await tree.close()
    await build.close()
    assert f"k-{project.times.generation('k')}" == build.key


async def test_a_listing_that_was_told_but_not_taken_ends_the_generation(project):
    build = project.build(context=MANY)
    tree = await build.context.open("context", [], [], [])
    await entries_of(tree)
    await tree.close()
    await build.close()
    assert f"k-{project.times.generation('k')}" != build.key


async def test_files_of_the_start_need_no_client(project):
    inline = [
        InlineFile(local_name="dockerfile", path="Dockerfile", data=b"FROM scratch", mode=0o644),
        InlineFile(local_name="dockerfile", path="other", data=b"", mode=0o644),
        InlineFile(local_name="context", path=".dockerignore", data=b"x", mode=0o600),
    ]
    build = project.build(inline)
    tree = await build.context.open("dockerfile", [], [], ["Dockerfile"])
    assert list(await entries_of(tree)) == ["Dockerfile"]
    assert (tree.content_size(0), tree.content_size(1)) == (12, -1)
    assert await read_all(tree, 0) == b"FROM scratch"
    tree = await build.context.open("context", [], [], [".dockerignore"])
    assert [entry.mode for entry in (await entries_of(tree)).values()] == [0o600]
    tree = await build.context.open("named", [], [], [".dockerignore"])
    assert await entries_of(tree) == {}
    assert build.client.requests == []
    with pytest.raises(UsageError, match="bad path"):
        project.build([InlineFile(path="../x")])


async def test_a_source_that_the_client_cannot_read_is_its_sentence(project):
    build = project.build()
    tree = await build.context.open("nothing", [], [], [])
    with pytest.raises(ContextError, match="there is no such tree"):
        await entries_of(tree)
    await tree.close()
    assert not build.link.lost


def damaged(pages: list[EncodedPage]) -> None:
    pages[2] = EncodedPage(pages[2].digest, pages[2].data[:-1] + b"!", pages[2].times)


def without_times(pages: list[EncodedPage]) -> None:
    pages[2] = EncodedPage(pages[2].digest, pages[2].data, pages[2].times[:-1])


def swapped(pages: list[EncodedPage]) -> None:
    pages[1], pages[2] = pages[2], pages[1]


def no_page(pages: list[EncodedPage]) -> None:
    pages[2] = EncodedPage(hashlib.sha256(b"\xff").digest(), b"\xff", [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (damaged, "another page"),
        (without_times, "all of its times"),
        (swapped, "not in a directory|out of order"),
        (no_page, "damaged"),
    ],
)
async def test_a_hostile_listing_ends_the_build_with_one_sentence(project, change, sentence):
    build = project.build(context=MANY)
    tree = await build.context.open("context", [], [], [])
    pages = encoded(MANY)
    change(pages)
    build.client.encoded_pages = pages
    with pytest.raises(UsageError, match=sentence):
        await entries_of(tree)
    await tree.close()
    assert isinstance(build.link.error, UsageError)
    assert await project.store.run(project.store.missing_sync, [pages[-1].digest])


async def test_any_stored_file_may_be_announced_as_a_page_and_is_looked_at(project):
    data = b"a file of the project that is no page"
    digest = hashlib.sha256(data).digest()
    await project.store.run(project.store.store_sync, [(digest, data)])
    build = project.build(context=with_parents({"a/b": file(b"1")}))
    build.client.encoded_pages = [EncodedPage(digest, data, [1])]
    tree = await build.context.open("context", [], [], [])
    with pytest.raises(UsageError, match="damaged listing"):
        await entries_of(tree)
    await tree.close()


async def test_pages_that_have_gone_from_the_disk_are_asked_for_again(project):
    build = project.build(context=MANY)
    await build.told()
    # The build holds its pages; when it is over they may be collected.
    digests = [page.digest for page in encoded(MANY)]
    project.store._keep_bytes = 0
    assert await project.store.trim() == 0
    await build.close()
    assert await project.store.trim() > 0
    assert len(await project.store.run(project.store.missing_sync, digests)) == len(digests)
    again = project.build(context=later(MANY))
    told = await again.told()
    assert again.client.asked_pages == len(digests)
    assert all(told[path].modified_at_ns == MANY[path].modified_at_ns for path in MANY)


async def test_a_layout_is_listed_without_touching_the_memory(project):
    layout = deep(["blobs/sha256/ab", "index.json"])
    build = project.build(**{"oci:base": layout})
    tree = await build.context.open_tree("oci:base")
    await tree.complete()
    index = tree.index_of("index.json")
    assert index == 3
    assert (tree.index_of("blobs"), tree.index_of("none"), tree.index_of("")) == (0, None, None)
    assert tree.content_size(index) == 10
    await tree.requested([index])
    assert await read_all(tree, index) == b"index.json"
    await tree.close()
    await build.close()
    assert f"k-{project.times.generation('k')}" == build.key


async def test_a_client_that_leaves_ends_the_listing(project):
    build = project.build(context=MANY)
    build.client.hold.clear()
    tree = await build.context.open("context", [], [], [])
    reading = asyncio.ensure_future(entries_of(tree))
    await asyncio.sleep(0.01)
    build.link.lose(NodeLostError("the client went away"))
    with pytest.raises(NodeLostError, match="went away"):
        await reading
    await tree.close()
    with pytest.raises(NodeLostError, match="went away"):
        await build.context.open("context", [], [], [])


async def test_the_first_pages_are_told_before_the_last_are_announced(project):
    build = project.build()
    build.client.manual = True
    tree = await build.context.open("context", [], [], [])
    while not build.client.requests:
        await asyncio.sleep(0)
    pages = encoded(MANY)
    build.client.pages[1] = pages

    def announce(some: list[EncodedPage], *, last: bool) -> None:
        names = b"".join(page.digest for page in some)
        build.link.context_listing(ContextListing(request_id=1, pages=names, last=last))

    announce(pages[:2], last=False)
    runs = tree.runs()
    run = await asyncio.wait_for(anext(runs), 5)
    assert read_frames(run.frames)[0].path == "src"
    announce(pages[2:], last=True)
    count = run.count
    async for run in runs:
        count += run.count
    assert count == len(MANY)
    await tree.delivered()
    await tree.close()
