"""Listings of a client through the node's context into a real BuildKit."""

from __future__ import annotations

import asyncio
import io
import random
import tarfile

import pytest

from offload_builder.buildkit import BkSession, SessionProviders, SolveResult, SolveSpec
from offload_core.errors import UsageError
from offload_core.filemode import (
    MODE_DIR,
    MODE_NAMED_PIPE,
    MODE_SETGID,
    MODE_SETUID,
    MODE_SOCKET,
)
from offload_proto.v1.node_service_pb2 import InlineFile
from tests.fixtures.buildcontext import ContextBuild, ContextProject
from tests.fixtures.buildkit import MemorySink, running_daemon
from tests.fixtures.listings import (
    Node,
    Tree,
    deep,
    file,
    folder,
    hardlink,
    ordered,
    symlink,
    with_parents,
)

DOCKERFILE = InlineFile(
    local_name="dockerfile", path="Dockerfile", data=b"FROM scratch\nCOPY . /\n", mode=0o644
)


@pytest.fixture
async def client():
    async with running_daemon() as daemon:
        yield daemon.client


@pytest.fixture
async def project(tmp_path):
    async with ContextProject(tmp_path) as made:
        yield made


class Built:
    """One build of `COPY . /`: what came out, and what BuildKit asked for."""

    def __init__(self, build: ContextBuild, archive: bytes) -> None:
        self.sent = sorted(build.client.asked_entries)
        self.build = build
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            self.members = {member.name.rstrip("/"): member for member in tar}
            self.contents = {
                name: tar.extractfile(member).read()
                for name, member in self.members.items()
                if member.isreg() or member.islnk()
            }


async def build(client, project: ContextProject, tree: Tree) -> Built:
    made = project.build([DOCKERFILE], context=tree)
    requested: list[str] = []
    original = made.content.request

    async def request(files):
        requested.extend(file.path for file in files)
        await original(files)

    made.content.request = request
    sink = MemorySink()
    providers = SessionProviders(source=made.context, outputs=sink)
    async with BkSession(client, made.key, providers) as session:
        spec = SolveSpec({"filename": "Dockerfile"}, exporters=[("tar", {})])
        result = await client.solve(spec, session)
    assert isinstance(result, SolveResult)
    await made.close()
    built = Built(made, bytes(sink.writers[0].data))
    built.requested = sorted(requested)
    return built


def at(tree: Tree, modified_at_ns: int) -> dict[str, Node]:
    """The tree as another checkout has it."""
    return {
        path: Node(node.content, node.mode, modified_at_ns, node.link, node.xattrs)
        for path, node in tree.items()
    }


EVERYTHING = with_parents(
    {
        "a": file(b"first", mode=0o751), "a b/c d+%2F": file(b"space"), "a.b": file(b""),
        "dir": folder(mode=MODE_DIR | 0o711), "dir/sub/empty": folder(),
        "hard1": hardlink("a", mode=0o751), "hard2": hardlink("a", mode=0o751),
        "large": file(random.Random(1).randbytes(3 << 20)),
        "link": symlink("a"), "link-out": symlink("../../etc/passwd"), "link-up": symlink("dir/.."),
        "noted": file(b"noted", xattrs={"user.note": b"value\0x"}),
        "pipe": Node(b"", MODE_NAMED_PIPE | 0o600), "socket": Node(b"", MODE_SOCKET | 0o755),
        "set": file(b"#!", mode=0o755 | MODE_SETUID | MODE_SETGID), "ünï/cödé": file("é".encode()),
        "/".join(f"d{depth}" for depth in range(60)): file(b"deep"),
        "n" * 250: file(b"long name"),
    }
)  # fmt: skip


async def test_every_kind_of_entry_arrives_and_a_fresh_checkout_sends_nothing(client, project):
    first = await build(client, project, EVERYTHING)
    kinds = {name: (member.type, member.linkname) for name, member in first.members.items()}
    assert set(ordered(EVERYTHING)) <= set(kinds) | {"socket"}
    assert first.members["a"].mode == 0o751
    assert first.members["set"].mode == 0o6755
    assert first.members["dir"].mode == 0o711
    assert kinds["link-out"] == (tarfile.SYMTYPE, "../../etc/passwd")
    assert kinds["link-up"] == (tarfile.SYMTYPE, "dir/..")
    assert kinds["pipe"][0] == tarfile.FIFOTYPE
    assert first.members["noted"].pax_headers["SCHILY.xattr.user.note"] == "value\0x"
    assert {first.contents[name] for name in ("a", "hard1", "hard2")} == {b"first"}
    for path, node in EVERYTHING.items():
        if node.content and not node.link:
            assert first.contents[path] == node.content
    again = await build(client, project, at(EVERYTHING, 1_600_000_000_000_000_000))
    assert again.requested == []
    assert again.contents == first.contents


async def test_content_of_same_size_and_time_behind_hard_links_is_never_stale(client, project):
    tree = {**EVERYTHING}
    for content in (b"secnd", b"third", b"first"):
        tree["a"] = file(content, mode=0o751)
        built = await build(client, project, tree)
        assert {built.contents[name] for name in ("a", "hard1", "hard2")} == {content}
    assert built.requested == ["a"]
    # The file becomes a link and the link a file.
    tree = {**tree, "a": file(b"three", mode=0o751), "hard1": file(b"other", mode=0o751)}
    built = await build(client, project, tree)
    assert (built.contents["a"], built.contents["hard1"]) == (b"three", b"other")
    assert built.contents["hard2"] == b"three"


async def test_random_changes_always_arrive_and_nothing_else_is_sent(client, project):
    chosen = random.Random(7)
    tree = deep(f"src/m{number // 40}/f{number:03}" for number in range(400))
    names = [path for path in tree if tree[path].content]
    for _ in range(6):
        changed = {}
        for path in chosen.sample(names, 5):
            old = tree.get(path)
            if chosen.random() < 0.2:
                changed[path] = None
            else:
                size = len(old.content) if old else 4
                changed[path] = file(chosen.randbytes(size))  # always the same time
        before = {path for path in tree if tree[path].content}
        tree = {**tree, **{path: node for path, node in changed.items() if node}}
        for path in [path for path, node in changed.items() if node is None]:
            tree.pop(path, None)
        built = await build(client, project, at(tree, chosen.randrange(10**18)))
        expected = {path: node.content for path, node in tree.items() if node.content}
        assert {path: built.contents[path] for path in expected} == expected
        assert set(built.contents) == set(expected)
        new = {path for path, node in changed.items() if node}
        assert set(built.requested) == new or set(built.requested) == set(expected) != before


async def test_a_build_that_is_cancelled_within_the_transfer_leaves_nothing_stale(client, project):
    tree = deep(f"f{number:03}" for number in range(300))
    await build(client, project, tree)
    changed = {path: file(b"F" + node.content[1:]) for path, node in tree.items()}
    made = project.build([DOCKERFILE], context=changed)
    hanging = asyncio.Event()

    async def deliver(blobs):
        hanging.set()
        await asyncio.sleep(3600)

    made.client.deliver = deliver
    async with BkSession(client, made.key, SessionProviders(source=made.context)) as session:
        solving = asyncio.ensure_future(
            client.solve(SolveSpec({"filename": "Dockerfile"}), session)
        )
        await asyncio.wait_for(hanging.wait(), 20)
        solving.cancel()
        await asyncio.wait((solving,))
    await made.close()
    assert f"k-{project.times.generation('k')}" != made.key
    last = {path: file(b"G" + node.content[1:]) for path, node in tree.items()}
    built = await build(client, project, last)
    assert built.contents == {path: node.content for path, node in last.items()}


async def test_a_hostile_listing_fails_the_build_with_its_sentence(client, project):
    made = project.build([DOCKERFILE], context={"l": symlink("/etc"), "l/passwd": file(b"x")})
    async with BkSession(client, made.key, SessionProviders(source=made.context)) as session:
        with pytest.raises(UsageError, match=r"listed 'l/passwd'.*not in a directory"):
            await client.solve(SolveSpec({"filename": "Dockerfile"}), session)
    assert isinstance(made.link.error, UsageError)


async def test_listing_request_and_content_are_pipelined(client, project):
    """BuildKit asks for files of the first pages while the last are not announced."""
    tree = deep(f"src/m{number // 100}/f{number:04}" for number in range(3000))
    made = project.build([DOCKERFILE], context=tree)
    asked_early: list[int] = []
    announce = made.link.context_listing

    def slowly(message):
        if message.last:
            asked_early.append(len(made.client.asked_entries))
        announce(message)

    made.link.context_listing = slowly

    def spaced(request_id, digests):
        async def later():
            for start in range(0, len(digests), 2):
                some = digests[start : start + 2]
                last = start + 2 >= len(digests)
                made.link.context_listing(made.client.message(request_id, some, last=last))
                await asyncio.sleep(0.05)

        made.spaced = asyncio.ensure_future(later())

    made.client.announce = spaced
    async with BkSession(client, made.key, SessionProviders(source=made.context)) as session:
        result = await client.solve(SolveSpec({"filename": "Dockerfile"}), session)
    assert isinstance(result, SolveResult)
    await made.spaced
    assert asked_early[-1] > 100
