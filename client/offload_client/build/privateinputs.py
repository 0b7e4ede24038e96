"""What a build gets from its user and nobody else may see: secrets, and the use of SSH keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.build.remotecontext import is_git_over_ssh
from offload_client.build.secretoptions import DEFAULT_AGENT, AgentOption
from offload_client.build.secretvalues import SecretValues
from offload_client.build.sshagents import SshAgents, SshStreams
from offload_client.bytepipe import in_thread
from offload_core.aio import TaskSet
from offload_core.errors import OffloadError
from offload_proto.v1.node_service_pb2 import RunRequest, SecretReply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation
    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.node_service_pb2 import RunResponse, SecretRequest

    Send = Callable[[RunRequest], Awaitable[None]]

REQUESTS = ("secret_request", "ssh_open", "ssh_data")
"""What `PrivateAnswers` answers: fields of `RunResponse`."""


class PrivateInputs:
    """The secrets and agents of one build, over all of its attempts."""

    def __init__(self, invocation: Invocation, options: BuildOptions) -> None:
        """Look whether they can be had; reads key files.

        Raises:
            InvalidValueError: something is missing or not usable.
            ConfigError: the library for key files is not installed.
        """
        agents = list(options.agents)
        if not agents and is_git_over_ssh(options.path):
            # As buildx does: the node cannot fetch the context without it.
            agents.append(AgentOption(DEFAULT_AGENT))
        self.secrets = SecretValues(invocation, options.secrets)
        self.agents = SshAgents(invocation, agents)
        self._entitlements = options.entitlements

    def add_to(self, spec: BuildSpec) -> None:
        """Say in a request what there is; never what it is."""
        spec.secret_ids.extend(self.secrets.ids)
        spec.ssh_ids.extend(self.agents.ids)
        spec.entitlements.extend(self._entitlements)


class PrivateAnswers:
    """Answers one node about them, over one control stream."""

    def __init__(self, inputs: PrivateInputs, send: Send) -> None:
        self._secrets = inputs.secrets
        self._send = send
        self._streams = SshStreams(inputs.agents, send)
        self._tasks = TaskSet()

    def take(self, message: RunResponse) -> None:
        """Answer a message of one of the kinds in `REQUESTS`."""
        kind = message.WhichOneof("message")
        if kind == "secret_request":
            request = message.secret_request
            self._tasks.start(self._answer(request), name=f"secret {request.secret_id}")
        elif kind == "ssh_open":
            self._streams.open(message.ssh_open)
        elif kind == "ssh_data":
            self._streams.take(message.ssh_data)

    async def close(self) -> None:
        """End all that still goes on."""
        await self._tasks.close()
        await self._streams.close()

    async def _answer(self, request: SecretRequest) -> None:
        reply = SecretReply(request_id=request.request_id)
        try:
            value = await in_thread(lambda: self._secrets.read(request.secret_id), name="secret")
        except OffloadError as error:
            reply.error = error.message
        else:
            reply.found = value is not None
            reply.data = value or b""
        await self._send(RunRequest(secret_reply=reply))
