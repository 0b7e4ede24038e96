"""SSH agents for build steps: the session service that BuildKit calls for `--mount=type=ssh`.

Source: BuildKit's session/sshforward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.h2.messages import INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE, GrpcError
from offload_core.errors import OffloadError, UsageError
from offload_core.sshagent import FrameReader
from offload_proto.buildkit.sshforward_pb2 import (
    BytesMessage,
    CheckAgentRequest,
    CheckAgentResponse,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.providers import AgentSource

    Handler = Callable[[ServerCall], Awaitable[None]]

_SERVICE = "/moby.sshforward.v1.SSH/"
_AGENT_ID = "buildkit.ssh.id"
DEFAULT_ID = "default"


def agent_services(source: AgentSource) -> dict[str, Handler]:
    """Return the handlers by method name."""
    return {
        f"{_SERVICE}CheckAgent": lambda call: _serve_check(call, source),
        f"{_SERVICE}ForwardAgent": lambda call: _serve_forward(call, source),
    }


async def _serve_check(call: ServerCall, source: AgentSource) -> None:
    request = CheckAgentRequest.FromString(await call.receive_one())
    _known(request.ID, source)
    await call.send([CheckAgentResponse().SerializeToString()])


def _known(name: str, source: AgentSource) -> str:
    name = name or DEFAULT_ID
    if not source.has(name):
        raise GrpcError(NOT_FOUND, f"unset ssh forward key {name}")
    return name


async def _serve_forward(call: ServerCall, source: AgentSource) -> None:
    """Carry requests and replies, one at a time: a step that sends more is held back.

    What goes wrong here ends this connection of the step only, which may do without.
    """
    name = _known(call.metadata.get(_AGENT_ID, [""])[0], source)
    frames = FrameReader()
    try:
        async with source.connect(name) as connection:
            while messages := await call.receive():
                for message in messages:
                    for request in frames.feed(BytesMessage.FromString(message).data):
                        reply = await connection.ask(request)
                        await call.send([BytesMessage(data=reply).SerializeToString()])
    except UsageError as error:
        raise GrpcError(INVALID_ARGUMENT, error.message) from error
    except OffloadError as error:
        raise GrpcError(UNAVAILABLE, error.message) from error
