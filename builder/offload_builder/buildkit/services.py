"""The small services of a session: health, secrets, and results on their way back.

Source: BuildKit's session/secrets and session/filesync; gRPC's health protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.agents import agent_services
from offload_builder.buildkit.authservice import auth_services
from offload_builder.buildkit.contentstore import content_services
from offload_builder.buildkit.filesync import serve_diff_copy
from offload_builder.buildkit.h2.messages import CANCELLED, NOT_FOUND, GrpcError
from offload_builder.buildkit.policyservice import policy_services
from offload_core.aio import finish
from offload_proto.buildkit.filesync_pb2 import BytesMessage
from offload_proto.buildkit.secrets_pb2 import GetSecretRequest, GetSecretResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.providers import (
        OutputSink,
        SecretSource,
        SessionProviders,
    )

    Handler = Callable[[ServerCall], Awaitable[None]]

_SERVING = b"\x08\x01"
_EXPORTER_ID = "buildkit-attachable-exporter-id"
_EXPORTER_NOTE = "exporter-md-"
_ABORT_SECONDS = 10.0


def session_services(providers: SessionProviders) -> dict[str, Handler]:
    """Return the handlers of a session by method name."""
    handlers: dict[str, Handler] = {"/grpc.health.v1.Health/Check": _serve_health}
    source, credentials = providers.source, providers.credentials
    secrets, outputs = providers.secrets, providers.outputs
    if source is not None:
        handlers["/moby.filesync.v1.FileSync/DiffCopy"] = lambda call: serve_diff_copy(call, source)
    if credentials is not None:
        handlers |= auth_services(credentials)
    if secrets is not None:
        handlers["/moby.buildkit.secrets.v1.Secrets/GetSecret"] = lambda call: _serve_secret(
            call, secrets
        )
    if providers.agents is not None:
        handlers |= agent_services(providers.agents)
    if outputs is not None:
        handlers["/moby.filesync.v1.FileSend/DiffCopy"] = lambda call: _serve_output(call, outputs)
    if providers.rules is not None:
        handlers |= policy_services(providers.rules)
    if providers.layouts is not None:
        handlers |= content_services(providers.layouts)
    return handlers


async def _serve_health(call: ServerCall) -> None:
    await call.receive_one()
    await call.send([_SERVING])


async def _serve_secret(call: ServerCall, source: SecretSource) -> None:
    request = GetSecretRequest.FromString(await call.receive_one())
    data = await source.get(request.ID)
    if data is None:
        # The daemon goes on without it where the Dockerfile says that it is optional.
        raise GrpcError(NOT_FOUND, f"secret {request.ID}: not found")
    await call.send([GetSecretResponse(data=data).SerializeToString()])


async def _serve_output(call: ServerCall, sink: OutputSink) -> None:
    text = call.metadata.get(_EXPORTER_ID, ["0"])[0]
    notes = {
        name.removeprefix(_EXPORTER_NOTE): ",".join(values)
        for name, values in call.metadata.items()
        if name.startswith(_EXPORTER_NOTE)
    }
    writer = await sink.open(int(text) if text.isdigit() else 0, notes)
    complete = False
    try:
        while messages := await call.receive():
            for message in messages:
                await writer.write(BytesMessage.FromString(message).data)
        if call.ended_by_peer:
            raise GrpcError(CANCELLED, "BuildKit ended the result early")
        await writer.close()
        complete = True
    finally:
        if not complete:
            await finish(writer.abort(), _ABORT_SECONDS)
