"""What a daemon recorded of a finished build: its provenance.

Source: BuildKit api/services/control/control.proto (ListenBuildHistory) and
solver/llbsolver/history.go.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from offload_builder.buildkit.contentstore import READ
from offload_builder.buildkit.h2.messages import RESOURCE_EXHAUSTED, GrpcError
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit.content_pb2 import ReadContentRequest, ReadContentResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.buildkit.h2.client import GrpcClient

MAX_PROVENANCE_BYTES = 8 << 20
_SERVICE = "/moby.buildkit.v1.Control/"
_STATEMENT = "application/vnd.in-toto+json"
_PREDICATE = "in-toto.io/predicate-type"
_PROVENANCE = "https://slsa.dev/provenance/"


async def read_provenance(grpc: GrpcClient, ref: str) -> dict[str, bytes]:
    """Return the provenance of a build as JSON, by platform; "" for a build for one.

    Raises:
        GrpcError: the daemon does not answer, or the provenance is too large.
    """
    found: dict[str, bytes] = {}
    request = control.BuildHistoryRequest(Ref=ref, EarlyExit=True).SerializeToString()
    async with aclosing(grpc.stream(f"{_SERVICE}ListenBuildHistory", request)) as messages:
        async for message in messages:
            record = control.BuildHistoryEvent.FromString(message).record
            results = dict(record.Results)
            if record.HasField("Result"):
                # Of a build for several it has the image only.
                results[""] = record.Result
            for platform, result in results.items():
                statement = _provenance(result.Attestations)
                if statement is not None:
                    found[platform] = await _read(grpc, statement)
    return found


async def forget_record(grpc: GrpcClient, ref: str) -> None:
    """Let the daemon forget a build.

    Raises:
        GrpcError: it does not answer, or does not know the build.
    """
    request = control.UpdateBuildHistoryRequest(Ref=ref, Delete=True)
    await grpc.unary(f"{_SERVICE}UpdateBuildHistory", request.SerializeToString())


def _provenance(statements: Sequence[control.Descriptor]) -> control.Descriptor | None:
    for item in statements:
        kind = item.annotations.get(_PREDICATE, "")
        if item.media_type == _STATEMENT and kind.startswith(_PROVENANCE):
            return item
    return None


async def _read(grpc: GrpcClient, item: control.Descriptor) -> bytes:
    if item.size > MAX_PROVENANCE_BYTES:
        raise GrpcError(RESOURCE_EXHAUSTED, f"the provenance has {item.size} bytes")
    request = ReadContentRequest(digest=item.digest, size=item.size).SerializeToString()
    data = bytearray()
    async with aclosing(grpc.stream(READ, request)) as messages:
        async for message in messages:
            data += ReadContentResponse.FromString(message).data
    return bytes(data)
