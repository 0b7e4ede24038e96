"""A client that lies about its build context harms its own build only, and hears why."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from offload_builder.node.listingfeed import MAX_PAGES
from offload_core.filemode import MODE_DEVICE, MODE_SYMLINK
from offload_core.listing import MAX_PAGE_BYTES, encode_page
from offload_proto.v1.node_service_pb2 import Failure
from tests.fixtures.hostileclient import MOMENT_NS, HostileClient, batch_of, page_of
from tests.fixtures.relayedpool import RelayedPool
from tests.fixtures.trees import noise, of_tar, write_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from offload_core.listing import Page


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    """One node."""
    with RelayedPool() as running:
        yield running


def client(relayed: RelayedPool) -> HostileClient:
    return HostileClient(relayed.address, relayed.admin_token)


@pytest.fixture(scope="module", autouse=True)
def honest_build(relayed: RelayedPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever these tests did: afterwards a build of somebody else works."""
    yield
    context = write_files(
        tmp_path_factory.mktemp("honest"), {"Dockerfile": "FROM scratch\nCOPY . /\n", "file": "x"}
    )
    result = relayed.member().build(context)
    assert result.returncode == 0, (result.stderr, relayed.tails())


LINK = {"modes": [MODE_SYMLINK | 0o777, 0o644], "links": {0: "/etc"}, "sizes_bytes": [0, 1]}
HOSTILE_PAGES: dict[str, tuple[list[Page], str]] = {
    "leaves the tree": ([page_of(("../x", b"x"))], "'../x'"),
    "absolute": ([page_of(("/etc/passwd", b"x"))], "'/etc/passwd'"),
    "leaves in the middle": ([page_of(("a", None), ("a/../../x", b"x"))], "'a/../../x'"),
    "without a name": ([page_of(("", b"x"))], "''"),
    "below a link": ([page_of(("d", b""), ("d/passwd", b"x"), **LINK)], "'d/passwd'"),
    "below a file": ([page_of(("f", b"x"), ("f/x", b"x"))], "'f/x'"),
    "below nothing": ([page_of(("no/such/folder", b"x"))], "'no/such/folder'"),
    "out of order": ([page_of(("b", b"x"), ("a", b"x"))], "'a'"),
    "twice": ([page_of(("a", b"x"), ("a", b"x"))], "'a'"),
    "twice in two pages": ([page_of(("a", b"x")), page_of(("a", b"x"))], "'a'"),
    "device": (
        [page_of(("null", None), modes=[MODE_DEVICE | 0o666], devices={0: (1, 3)})],
        "'null'",
    ),
    "hard link out of the tree": (
        [page_of(("h", None), modes=[0o644], links={0: "../../etc/shadow"})],
        "'../../etc/shadow'",
    ),
    "hard link to nothing": ([page_of(("h", None), modes=[0o644], links={0: "zz"})], "h"),
    "attribute of the machine": (
        [page_of(("f", b"x"), xattrs={0: {"trusted.overlay.opaque": b"y"}})],
        "'f'",
    ),
    "fewer digests than files": ([page_of(("f", b"x"), digests=b"")], "damaged"),
    "gigantic": ([page_of(("f", b"x"), sizes_bytes=[2**64 - 1])], "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE_PAGES)
async def test_hostile_listing_is_refused_with_one_sentence(
    relayed: RelayedPool, case: str
) -> None:
    pages, words = HOSTILE_PAGES[case]
    async with client(relayed) as hostile:
        await hostile.list(*pages)
        failure = (await hostile.refused()).failure
        assert words in failure.message, failure


async def test_known_page_is_checked_again_in_another_place(relayed: RelayedPool) -> None:
    """Pages that are fine alone, put together wrongly, when the node has them already."""
    one, two = page_of(("m", b"one")), page_of(("z", b"two"))
    for order, accepted in (((one, two), True), ((two, one), False)):
        async with client(relayed) as hostile:
            digests = [hashlib.sha256(encode_page(page)).digest() for page in order]
            if accepted:
                await hostile.list(*order)
                await hostile.until("need_blobs")
                assert await hostile.upload(batch_of(b"one", b"two")) == ""
                result = await hostile.until("result")
                assert result.HasField("success"), result
            else:
                await hostile.announce(*digests)
                failure = (await hostile.refused()).failure
                assert "out of order" in failure.message


async def test_page_that_came_as_a_file_is_checked_as_any_other(relayed: RelayedPool) -> None:
    evil = encode_page(page_of(("../../escape", b"x")))
    page = page_of(("innocent", evil))
    async with client(relayed) as hostile:
        await hostile.list(page)
        await hostile.until("need_blobs")
        assert await hostile.upload(batch_of(evil)) == ""
        assert (await hostile.until("result")).HasField("success")
    async with client(relayed) as hostile:
        request_id = await hostile.announce(hashlib.sha256(evil).digest())
        message: Any = await hostile.call.read()
        while message.WhichOneof("message") not in ("need_pages", "result"):
            message = await hostile.call.read()
        if message.HasField("need_pages"):
            data = evil if list(message.need_pages.pages) else b""
            await hostile.page(request_id, 0, data, [MOMENT_NS])
            message = await hostile.call.read()
            while not message.HasField("result"):
                message = await hostile.call.read()
        assert "'../../escape'" in message.result.failure.message


async def test_bytes_that_are_no_page_are_refused(relayed: RelayedPool) -> None:
    good = encode_page(page_of(("file", b"x")))
    bomb = zstandard.compress(bytes(10 * MAX_PAGE_BYTES))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    small_claim = zstandard.compress(bytes(100))[:6] + silent[6:]
    for announced, data, options, words in (
        (good, good + b"\0", {}, "another page"),
        (good, bomb, {"zstd": True}, str(10 * MAX_PAGE_BYTES)),
        (good, silent, {"zstd": True}, "damaged"),
        (good, small_claim, {"zstd": True}, "damaged"),
        (good, b"not zstd", {"zstd": True}, "damaged"),
        (good, bytes(MAX_PAGE_BYTES + 1), {}, str(MAX_PAGE_BYTES)),
        (b"nothing", b"nothing", {}, "damaged"),
    ):
        async with client(relayed) as hostile:
            request_id = await hostile.announce(hashlib.sha256(announced).digest())
            await hostile.until("need_pages")
            await hostile.page(request_id, 0, data, [MOMENT_NS], **options)
            failure = (await hostile.refused()).failure
            assert words in failure.message, (words, failure)


async def test_endless_listing_is_refused(relayed: RelayedPool) -> None:
    async with client(relayed) as hostile:
        request_id = await hostile.announce(last=False)
        ending = asyncio.create_task(hostile.refused())
        # One more than fits. What is written to a call that has ended hides how it ended.
        for number in range(MAX_PAGES // 4_000 + 1):
            await hostile.name_pages(request_id, noise(number, 32 * 4_000), last=False)
        failure = (await ending).failure
        assert "too large" in failure.message
        assert "2000000" in failure.message


async def test_wrong_content_is_refused_logged_and_counted(relayed: RelayedPool) -> None:
    wanted = noise("wanted", 1_000)
    async with client(relayed) as hostile:
        await hostile.list(page_of(("folder", None), ("folder/file", wanted)))
        need = await hostile.until("need_blobs")
        assert list(need.entries) == [1]
        evil = batch_of(noise("evil", 1_000), sha256=[hashlib.sha256(wanted).digest()])
        await hostile.upload(evil)
        result = await hostile.refused()
        assert result.failure.kind == Failure.KIND_CONTEXT_CHANGED
        assert '"folder/file"' in result.failure.message
        assert result.stats.context_refused_blobs == 1
        build_id = hostile.build_id
    relayed.node.wait_for(r'"event": "context\.blob\.refused"')
    member = relayed.member()
    shown = member.offload("builds", build_id, "--format", "json")
    assert json.loads(shown.stdout)["stats"]["context_refused_blobs"] == 1
    # The digest still stands for its own bytes only.
    async with client(relayed) as honest:
        await honest.list(page_of(("folder", None), ("folder/file", wanted)))
        await honest.until("need_blobs")
        assert await honest.upload(batch_of(wanted)) == ""
        assert (await honest.until("result")).HasField("success")


@pytest.mark.parametrize("behaviour", ["lies", "leaves", "is silent"])
async def test_others_who_wait_for_the_same_content_get_it(
    relayed: RelayedPool, tmp_path: Path, behaviour: str
) -> None:
    """The first to be asked for content brings it for all; when it does not, others do."""
    wanted = noise(("awaited", behaviour), 100_000)
    context = write_files(
        tmp_path / "c", {"Dockerfile": "FROM scratch\nCOPY data /\n", "data": wanted}
    )
    member = relayed.member()
    async with client(relayed) as hostile:
        await hostile.list(page_of(("file", wanted)))
        await hostile.until("need_blobs")
        honest = asyncio.create_task(
            asyncio.to_thread(member.build, "-o", f"type=tar,dest={tmp_path}/out.tar", context)
        )
        await asyncio.sleep(2)
        if behaviour == "is silent":
            done, _ = await asyncio.wait((honest,), timeout=20)
            assert done, "the build waits for a client that has nothing to do with it"
        else:
            assert not honest.done()
        if behaviour == "lies":
            digest = hashlib.sha256(wanted).digest()
            await hostile.upload(batch_of(noise("lie", 100_000), sha256=[digest]))
            await hostile.refused()
    result = await honest
    assert result.returncode == 0, result.stderr
    assert of_tar(tmp_path / "out.tar")["data"].sha256 == hashlib.sha256(wanted).hexdigest()


def hostile_batches(wanted: bytes) -> dict[str, tuple[Any, str]]:
    digest = hashlib.sha256(wanted).digest()
    bomb = zstandard.compress(bytes(65 << 20))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(65 << 20))
    return {
        "bomb": (batch_of(wanted, data=bomb, zstd=True), ""),
        "bomb without a size": (batch_of(wanted, data=silent, zstd=True), ""),
        "bomb that says its size": (
            batch_of(wanted, sizes=[65 << 20], data=bomb, zstd=True),
            "",
        ),
        "shorter than it says": (batch_of(wanted, data=wanted[:-1]), ""),
        "longer than it says": (batch_of(wanted, data=wanted + b"x"), ""),
        "negative": (batch_of(wanted, sizes=[-1]), ""),
        "without sizes": (batch_of(wanted, sizes=[]), ""),
        "short digest": (batch_of(wanted, sha256=[digest[:31]]), ""),
        "nobody asked": (batch_of(noise("nobody asked", 1_000)), "not asked for"),
    }


@pytest.mark.parametrize("case", hostile_batches(b"w"))
async def test_hostile_upload_is_refused_with_one_sentence(relayed: RelayedPool, case: str) -> None:
    wanted = noise(("hostile", case), 1_000)
    batch, words = hostile_batches(wanted)[case]
    async with client(relayed) as hostile:
        await hostile.list(page_of(("file", wanted)))
        await hostile.until("need_blobs")
        await hostile.upload(batch)
        failure = (await hostile.refused()).failure
        assert words in failure.message


async def test_chunk_list_that_lies_is_refused(relayed: RelayedPool) -> None:
    size = (4 << 20) + 100
    for wrong in (
        b"no list of pieces",
        hashlib.sha256(b"x").digest() + (100).to_bytes(4, "little"),
        (hashlib.sha256(b"x").digest() + (0).to_bytes(4, "little")) * 2,
    ):
        page = page_of(("large", b"x"), sizes_bytes=[size], digests=hashlib.sha256(wrong).digest())
        async with client(relayed) as hostile:
            await hostile.list(page)
            await hostile.until("need_blobs")
            await hostile.upload(batch_of(wrong))
            failure = (await hostile.refused()).failure
            assert "chunk list" in failure.message, failure
