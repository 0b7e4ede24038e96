"""What BuildKit tells of a build, on its way into the journal."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from offload_builder.node.buildprogress import BuildProgress
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.journal import Journal
from offload_builder.node.solveplan import NameRewriter
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex, VertexLog, VertexWarning

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ADDRESS, CAPABILITY = "127.0.0.1:5", "c" * 192
PLACE = f"http://{ADDRESS}/v2/{CAPABILITY}/cache/blobs/sha256:1".encode()


async def test_capability_is_in_nothing_that_is_written(tmp_path: Path) -> None:
    # BuildKit writes "error: ..." and "retrying in ..." into the output of a step when a request
    # of a push or pull has failed.
    told = ProgressBatch(
        vertices=[Vertex(digest="v", name=f"importing {ADDRESS}/{CAPABILITY}/cache:import")],
        logs=[
            VertexLog(vertex="v", data=b"\xff plain\n"),
            VertexLog(vertex="v", data=b"\xff error: unexpected status from GET " + PLACE + b"\n"),
        ],
        warnings=[VertexWarning(vertex="v", short=PLACE, detail=[b"x", PLACE])],
    )

    async def status(_ref: str) -> AsyncIterator[ProgressBatch]:
        yield told

    client: Any = SimpleNamespace(status=status)
    path = tmp_path / "log"
    with Journal(path) as journal:
        rewrite = NameRewriter(ADDRESS, CAPABILITY)
        progress = BuildProgress(journal, ClientLink(), (), rewrite, ())
        progress.secret = CAPABILITY
        async with asyncio.timeout(10), progress.following(client, "ref"):
            pass
        journal.finish()
        assert journal.sequence == 1
        assert CAPABILITY.encode() not in path.read_bytes()
        (found,) = [batch async for run in journal.read() for batch in run]
        assert found.vertices[0].name == "importing the shared cache"
        assert found.logs[0].data == b"\xff plain\n"
        assert found.logs[1].data == (
            b"\xff error: unexpected status from GET http://127.0.0.1:5/v2/***/cache/blobs/sha256:1\n"
        )
        assert found.warnings[0].detail[0] == b"x"
        assert b"***" in found.warnings[0].short
