"""What a node asks the gateway about clients that know nothing of ours."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from weakref import WeakValueDictionary

import grpc
import structlog

from offload_core.aio import TaskSet
from offload_core.errors import (
    AccessDeniedError,
    AuthenticationError,
    GatewayUnreachableError,
    InternalError,
    NodeLostError,
    NotFoundError,
)
from offload_core.status import error_from_rpc
from offload_core.tls import GATEWAY_NAME, open_channel
from offload_core.versions import call_metadata
from offload_proto.v1.nodes_service_pb2 import AdmitRequest, AuthorizeRequest
from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import TracebackType

    from grpc import aio

    from offload_core.errors import OffloadError
    from offload_core.tls import KeyPair
    from offload_proto.v1.builds_service_pb2 import Assigned, CreateRequest
    from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceAsyncStub

log = structlog.get_logger(__name__)

RETIRE_SECONDS = 3600.0
"""For builds that wait in the queue over a connection with the former certificate."""
KNOWN_SECONDS = 10.0
"""For how long what the gateway has said of a member is taken as still so. Builds are always
looked at anew, and a revocation that the node hears of ends this at once."""
REFUSED_SECONDS = 2.0
"""So long a refusal is repeated without asking: a client that calls on asks the gateway seldom."""
AUTHORIZE_SECONDS = 8.0
"""With buildx's limit of 20 s for its first call, an answer still comes in time."""
PATIENCE_SECONDS = 300.0
"""A build keeps waiting for so long while the gateway is away; it keeps its place there."""
AWAY = (
    "the gateway does not answer; the build keeps its place while this connection lasts, "
    "else start it again"
)
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
_MAX_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class Guest:
    """A member in a project.

    Attributes:
        certificate_der: that it has proved in TLS.
        project_id: the project.
        member: name.
        role: for example "member".
        trust_domain: of its builds for which no branch is known.
    """

    certificate_der: bytes
    project_id: str
    member: str
    role: str
    trust_domain: str


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue; 0 while it is not known."""

    position: int
    reason: str


class GatewayDesk:
    """Calls to the gateway; use as an async context manager."""

    def __init__(self, address: str, keys: KeyPair) -> None:
        self._address = address
        self._keys = keys
        self._known: dict[bytes, tuple[float, Guest | OffloadError]] = {}
        self._turns: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._retiring = TaskSet()
        self._channel: aio.Channel
        self._stub: NodesServiceAsyncStub

    async def __aenter__(self) -> Self:
        self._open()
        return self

    def _open(self) -> None:
        keys = self._keys
        self._channel = open_channel(self._address, GATEWAY_NAME, ca_pem=keys.ca_pem, keys=keys)
        self._stub = NodesServiceStub(self._channel)

    def use(self, keys: KeyPair) -> None:
        """Call with another certificate from now on; calls that are open go on."""
        self._keys = keys
        self._retiring.start(self._channel.close(RETIRE_SECONDS), name="close-channel")
        self._open()

    def forget(self) -> None:
        """Ask the gateway again about everybody: somebody was revoked."""
        self._known.clear()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._retiring.close()
        await self._channel.close()

    async def authorize(self, certificate_der: bytes, project_id: str) -> Guest:
        """Return what a member is in a project now.

        Raises:
            OffloadError: the gateway refuses it, or does not answer.
        """
        key = hashlib.sha256(project_id.encode() + b"\0" + certificate_der).digest()
        if (guest := self._recall(key)) is not None:
            return guest
        # All calls of a client at once are one question.
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            if (guest := self._recall(key)) is not None:
                return guest
            try:
                guest = await self._ask(key, certificate_der, project_id)
            except (AuthenticationError, AccessDeniedError, NotFoundError) as error:
                self._note(key, error)
                raise
            self._note(key, guest)
            return guest

    def _recall(self, key: bytes) -> Guest | None:
        """Return what the gateway has said lately; None when it has to be asked.

        Raises:
            OffloadError: it has refused.
        """
        at, found = self._known.get(key, (0.0, None))
        age = time.monotonic() - at
        if isinstance(found, Guest):
            return found if age < KNOWN_SECONDS else None
        if found is not None and age < REFUSED_SECONDS:
            raise type(found)(found.message, hint=found.hint)
        return None

    def _note(self, key: bytes, said: Guest | OffloadError) -> None:
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[key] = (time.monotonic(), said)

    async def _ask(self, key: bytes, certificate_der: bytes, project_id: str) -> Guest:
        request = AuthorizeRequest(certificate_der=certificate_der, project_id=project_id)
        deadline = time.monotonic() + AUTHORIZE_SECONDS
        while True:
            try:
                answer = await self._stub.Authorize(
                    request, metadata=call_metadata(), timeout=AUTHORIZE_SECONDS
                )
                break
            except grpc.RpcError as error:
                self._known.pop(key, None)
                translated = self._translated(error)
                late = time.monotonic() + _RETRY_SECONDS[-1] > deadline
                if late or not isinstance(translated, GatewayUnreachableError):
                    raise translated from error
            await asyncio.sleep(_RETRY_SECONDS[1])
        return Guest(certificate_der, project_id, answer.member, answer.role, answer.trust_domain)

    async def admit(
        self, guest: Guest, build: CreateRequest, beside_build_id: str
    ) -> AsyncGenerator[Place | Assigned]:
        """Queue a build for this node; yield its places until it is assigned.

        While the gateway restarts the build waits on; leaving the generator leaves the queue.

        Args:
            guest: whose build it is.
            build: the request, with a request_id of its own.
            beside_build_id: a running build of the same client, whose slot this one shares.

        Raises:
            OffloadError: the gateway refuses the build, or is away for too long.
        """
        request = AdmitRequest(
            certificate_der=guest.certificate_der, build=build, beside_build_id=beside_build_id
        )
        away_since, failures = 0.0, 0
        while True:
            call = self._stub.Admit(request, metadata=call_metadata())
            try:
                async for message in call:
                    away_since, failures = 0.0, 0
                    if message.HasField("assigned"):
                        yield message.assigned
                        return
                    yield Place(message.queued.position, message.queued.reason)
                raise InternalError("the gateway ended the queue without an answer")
            except grpc.RpcError as error:
                translated = self._translated(error)
                if not isinstance(translated, GatewayUnreachableError | NodeLostError):
                    raise translated from error
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > PATIENCE_SECONDS:
                    raise translated from error
                log.info("buildkit.admission.retried", error=translated.message)
                yield Place(0, AWAY)
            finally:
                call.cancel()
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
            failures += 1

    def _translated(self, error: grpc.RpcError) -> OffloadError:
        return error_from_rpc(
            error,  # type: ignore[arg-type]
            peer=f"the gateway at {self._address}",
            unreachable=GatewayUnreachableError,
        )
