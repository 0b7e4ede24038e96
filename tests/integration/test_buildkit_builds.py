"""Builds on a real buildkitd, served from memory."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time

import pytest

from offload_builder.buildkit import (
    BkSession,
    BuildkitClient,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_core.errors import ContextChangedError, ContextError
from offload_proto.v1.events_pb2 import Vertex
from tests.fixtures.buildkit import (
    BASE,
    MemorySink,
    MemorySource,
    MemoryTree,
    build,
    dockerfile_source,
    running_daemon,
)
from tests.fixtures.listings import file, hardlink, symlink


@pytest.fixture
async def daemon():
    async with running_daemon(entitlements=["network.host"]) as running:
        yield running


@pytest.fixture
def client(daemon) -> BuildkitClient:
    return daemon.client


def unpacked(data: bytes) -> dict[str, bytes | None]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name: archive.extractfile(member).read() if member.isfile() else None
            for member in archive
        }


async def test_a_result_comes_back_as_tar(client):
    source = dockerfile_source(
        "FROM scratch\nCOPY dir /dir\n", {"dir/a.txt": b"A", "dir/sub/b": b"", "other": b"no"}
    )
    sink = MemorySink()
    result = await build(
        client, SessionProviders(source=source, outputs=sink), exporters=[("tar", {})]
    )
    assert isinstance(result, SolveResult)
    writer = sink.writers[0]
    assert writer.state == "closed"
    files = unpacked(bytes(writer.data))
    assert files["dir/a.txt"] == b"A"
    assert files["dir/sub/b"] == b""
    assert "other" not in files
    assert all(tree.closed for tree in source.served)


async def test_several_outputs_are_told_apart_and_have_notes(client):
    sink = MemorySink()
    result = await build(
        client,
        SessionProviders(source=dockerfile_source("FROM scratch\nCOPY . /\n"), outputs=sink),
        exporters=[("tar", {}), ("oci", {"name": "example.com/x:1"}), ("docker", {"name": "y"})],
    )
    assert isinstance(result, SolveResult)
    assert sorted(sink.writers) == [0, 1, 2]
    assert "index.json" in unpacked(bytes(sink.writers[1].data))
    assert "manifest.json" in unpacked(bytes(sink.writers[2].data))
    assert sink.writers[1].metadata["image.name"] == "example.com/x:1"
    assert result.exporter_response["containerimage.digest"].startswith("sha256:")


async def test_a_slow_output_holds_buildkit_back(client):
    class SlowSink(MemorySink):
        most = 0

        async def open(self, index, metadata):
            writer = await super().open(index, metadata)
            take = writer.write

            async def slow(data):
                SlowSink.most = max(SlowSink.most, len(data))
                await asyncio.sleep(0.005)
                await take(data)

            writer.write = slow
            return writer

    sink = SlowSink()
    result = await build(
        client,
        SessionProviders(
            source=dockerfile_source("FROM scratch\nCOPY big /\n", {"big": bytes(8 * 2**20)}),
            outputs=sink,
        ),
        exporters=[("tar", {})],
    )
    assert isinstance(result, SolveResult)
    assert len(sink.writers[0].data) > 8 * 2**20
    assert SlowSink.most <= 16 * 2**20


async def test_links_modes_and_awkward_names_arrive(client):
    tree = MemoryTree(
        {
            "a": file(b"one", mode=0o751),
            "hard": hardlink("a", mode=0o751),
            "link": symlink("a"),
            "name with  space+%2F": file(b"x"),
            "ünï": file(b"y"),
        }
    )

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            await super().open(name, include, exclude, follow)
            return self.served[-1] if name == "dockerfile" or follow == [".dockerignore"] else tree

    source = Source({"dockerfile": {"Dockerfile": b"FROM scratch\nCOPY . /\n"}, "context": {}})
    sink = MemorySink()
    result = await build(
        client, SessionProviders(source=source, outputs=sink), exporters=[("tar", {})]
    )
    assert isinstance(result, SolveResult)
    with tarfile.open(fileobj=io.BytesIO(bytes(sink.writers[0].data))) as archive:
        members = {member.name: member for member in archive}
    assert members["a"].mode == 0o751
    assert members["hard"].islnk() or members["hard"].size == 3
    assert members["link"].linkname == "a"
    assert {"name with  space+%2F", "ünï"} <= set(members)
    assert members["a"].mtime == 1_700_000_000


async def test_progress_is_followed_to_the_end(client):
    spec = SolveSpec({"filename": "Dockerfile"})
    source = dockerfile_source(BASE + "RUN echo to-stdout; echo to-stderr >&2\n")
    vertices: dict[str, Vertex] = {}
    logs = b""
    async with BkSession(client, "p", SessionProviders(source=source)) as session:
        solving = asyncio.create_task(client.solve(spec, session))
        async with asyncio.timeout(30):
            async for batch in client.status(spec.ref):
                vertices |= {vertex.digest: vertex for vertex in batch.vertices}
                logs += b"".join(log.data for log in batch.logs)
        assert isinstance(await solving, SolveResult)
    assert b"to-stdout" in logs
    assert b"to-stderr" in logs
    assert len(vertices) >= 4
    assert all(vertex.HasField("completed_at") for vertex in vertices.values())
    assert not any(vertex.error for vertex in vertices.values())


async def test_a_lint_finding_has_its_place(client):
    spec = SolveSpec({"filename": "Dockerfile"})
    source = dockerfile_source("from scratch AS x\nCOPY busybox /\n")
    async with BkSession(client, "p", SessionProviders(source=source)) as session:
        solving = asyncio.create_task(client.solve(spec, session))
        async with asyncio.timeout(30):
            warnings = [w async for batch in client.status(spec.ref) for w in batch.warnings]
        await solving
    assert warnings
    assert warnings[0].source_filename == "Dockerfile"
    assert warnings[0].ranges[0].start_line == 1


async def test_a_failed_step_has_its_exit_code_and_place(client):
    source = dockerfile_source(BASE + "RUN echo no && exit 7\n")
    failure = await build(client, SessionProviders(source=source))
    assert isinstance(failure, SolveFailure)
    assert failure.process_exit_code == 7
    assert failure.vertex.startswith("sha256:")
    assert failure.source_filename == "Dockerfile"
    assert failure.source_data.splitlines()[failure.ranges[0][0] - 1] == b"RUN echo no && exit 7"
    assert "exit code: 7" in failure.message
    assert not failure.is_cache_fault


async def test_a_dockerfile_that_cannot_be_parsed_has_its_place(client):
    source = dockerfile_source("FROM scratch\nCOPPY a b\n")
    failure = await build(client, SessionProviders(source=source))
    assert isinstance(failure, SolveFailure)
    assert "unknown instruction: COPPY" in failure.message
    assert failure.ranges[0][0] == 2
    assert failure.process_exit_code is None


class Secrets:
    async def get(self, secret_id):
        return {"token": b"s3cret\x00"}.get(secret_id)


async def test_secrets_reach_steps(client):
    source = dockerfile_source(
        BASE
        + "RUN --mount=type=secret,id=token /bin/busybox od -An -c /run/secrets/token > /out\n"
        + "RUN --mount=type=secret,id=other,required=false test ! -e /run/secrets/other\n"
    )
    sink = MemorySink()
    result = await build(
        client,
        SessionProviders(source=source, secrets=Secrets(), outputs=sink),
        exporters=[("tar", {})],
    )
    assert isinstance(result, SolveResult)
    files = unpacked(bytes(sink.writers[0].data))
    assert files["out"].split() == [b"s", b"3", b"c", b"r", b"e", b"t", b"\\0"]


async def test_a_required_secret_that_is_missing_fails_the_build(client):
    source = dockerfile_source(
        BASE + "RUN --mount=type=secret,id=other,required=true /bin/busybox true\n"
    )
    failure = await build(client, SessionProviders(source=source, secrets=Secrets()))
    assert isinstance(failure, SolveFailure)
    assert "other" in failure.message


async def test_cancelling_kills_the_running_step(client):
    spec = SolveSpec({"filename": "Dockerfile"})
    source = dockerfile_source(BASE + "RUN echo running; /bin/busybox sleep 4711.25\n")

    def sleeping() -> bool:
        return any(b"4711.25" in arguments for arguments in command_lines())

    async with BkSession(client, "p", SessionProviders(source=source)) as session:
        solving = asyncio.create_task(client.solve(spec, session))
        async with asyncio.timeout(30):
            async for batch in client.status(spec.ref):
                if any(b"running" in log.data for log in batch.logs):
                    break
            while not sleeping():
                await asyncio.sleep(0.02)
        solving.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await solving
        while sleeping() and time.monotonic() - began < 10:
            await asyncio.sleep(0.02)
        assert time.monotonic() - began < 2


def command_lines() -> list[bytes]:
    from pathlib import Path

    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return [line for line in found if line.startswith(b"/bin/busybox\0sleep")]


async def test_a_provider_error_reaches_the_caller_unchanged(client):
    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            if follow != [".dockerignore"] and name == "context":
                raise ContextError("the build context /home/x cannot be read: no such directory")
            return await super().open(name, include, exclude, follow)

    source = Source({"dockerfile": {"Dockerfile": b"FROM scratch\nCOPY . /\n"}, "context": {}})
    with pytest.raises(ContextError, match="/home/x cannot be read"):
        await build(client, SessionProviders(source=source))


async def test_a_provider_error_while_reading_is_in_the_build_log_too(client):
    class Tree(MemoryTree):
        async def read(self, index):
            yield b"part"
            raise ContextChangedError("the file a.txt changed while it was read")

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            tree = await super().open(name, include, exclude, follow)
            return tree if name == "dockerfile" else Tree(tree.tree)

    source = Source(
        {
            "dockerfile": {"Dockerfile": b"FROM scratch\nCOPY a.txt /\n"},
            "context": {"a.txt": b"part and more"},
        }
    )
    spec = SolveSpec({"filename": "Dockerfile"})
    async with BkSession(client, "p", SessionProviders(source=source)) as session:
        solving = asyncio.create_task(client.solve(spec, session))
        async with asyncio.timeout(30):
            errors = [
                vertex.error
                async for batch in client.status(spec.ref)
                for vertex in batch.vertices
                if vertex.error
            ]
        with pytest.raises(ContextChangedError, match=r"a\.txt changed"):
            await solving
    assert any("a.txt changed while it was read" in error for error in errors)


async def test_a_file_of_another_size_than_listed_is_an_error(client):
    class Tree(MemoryTree):
        async def read(self, index):
            yield b"longer than listed"

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            tree = await super().open(name, include, exclude, follow)
            return tree if name == "dockerfile" else Tree(tree.tree)

    source = Source(
        {"dockerfile": {"Dockerfile": b"FROM scratch\nCOPY a /\n"}, "context": {"a": b"short"}}
    )
    with pytest.raises(ContextChangedError, match="18 bytes, 5 were listed"):
        await build(client, SessionProviders(source=source))


async def test_a_name_that_is_not_offered_fails_with_its_name(client):
    source = dockerfile_source("FROM scratch\nCOPY --from=extra a /\n")
    failure = None
    with pytest.raises(Exception, match="no local source") as caught:
        failure = await build(
            client, SessionProviders(source=source), attributes={"context:extra": "local:extra"}
        )
    assert failure is None
    assert caught.value.reason == "NOT_FOUND"


async def test_disk_usage_and_prune(client):
    source = dockerfile_source(BASE + "RUN echo x > /y\n")
    assert isinstance(await build(client, SessionProviders(source=source)), SolveResult)
    records = await client.disk_usage()
    assert sum(record.size_bytes for record in records) > 1_000_000
    assert {"regular", "source.local"} <= {record.kind for record in records}
    freed = await client.prune(everything=True)
    assert sum(record.size_bytes for record in freed) > 1_000_000
    assert not await client.disk_usage()
