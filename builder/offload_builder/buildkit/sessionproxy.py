"""A client's session with a proxy in its middle: logins are answered here, all else is passed on.

A session is an HTTP/2 connection inside the messages of a Control.Session call, in which the daemon
is the client. Both ends of it end here, so that a call of the daemon can be answered, or begun anew
towards the client with the same headers. Bytes are handled twice; only sessions of projects for
which the pool holds logins go this way.
Source: BuildKit's session/grpchijack and session/auth.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

from offload_builder.buildkit.authservice import auth_services
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.messages import (
    CANCELLED,
    INTERNAL,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    GrpcError,
    MessageReader,
    message_prefix,
    status_of,
)
from offload_builder.buildkit.h2.server import ServerCall
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError
from offload_builder.buildkit.policyservice import CHECK_POLICY, refusal_of
from offload_builder.buildkit.sessiongreeting import wrapped
from offload_core.aio import TaskSet, stop
from offload_core.errors import OffloadError
from offload_proto.buildkit.auth_pb2 import (
    CredentialsRequest,
    CredentialsResponse,
    FetchTokenRequest,
)
from offload_proto.buildkit.control_pb2 import BytesMessage
from offload_proto.buildkit.secrets_pb2 import GetSecretRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.stream import Http2Stream
    from offload_builder.buildkit.providers import CredentialSource, SourceRules

    Relay = Callable[[Http2Stream, Http2Connection, bytes | None], Awaitable[None]]

log = structlog.get_logger(__name__)

AUTH = "/moby.filesync.v1.Auth/"
LOGIN_SECONDS = 60.0
"""BuildKit's own patience."""
_CLOSE_SECONDS = 0.5
DISCLOSURE = "/moby.buildkit.secrets.v1.Secrets/GetSecret"
"""The call in which a daemon asks for a secret by its name."""
MAX_LOGIN_BYTES = 64 << 10


class SessionProxy:
    """Both ends of one session; `run` lasts as long as it.

    Args:
        client: the stream of the client's Session call.
        daemon: the stream of the same call at the daemon.
        holds: says whether the pool has a login for a registry host.
        source: answers for these hosts.
        asked: hears of the name of each secret that the daemon asks the client for.
        relay: passes a stream of the daemon on to the client's connection; with the request, when
            that was read already.
        rules: about sources; what they allow is asked of the client too. None to ask it only.
    """

    def __init__(
        self,
        client: Http2Stream,
        daemon: Http2Stream,
        holds: Callable[[str], bool],
        source: CredentialSource,
        asked: Callable[[str], None],
        relay: Relay,
        rules: SourceRules | None = None,
    ) -> None:
        self._client = client
        self._daemon = daemon
        self._holds = holds
        self._asked = asked
        self._relay = relay
        self._rules = rules
        self._handlers = auth_services(source)
        self._tasks = TaskSet(_failed)
        self._to_client = Http2Connection(
            lambda pieces: client.write(wrapped(pieces)), client=True, greeted=True
        )
        self._to_daemon = Http2Connection(
            lambda pieces: daemon.write(wrapped(pieces)), client=False, on_stream=self._accept
        )

    async def run(self, first: list[bytes]) -> None:
        """Serve until one end goes; the client was greeted before.

        Args:
            first: what the client has sent before.

        Raises:
            StreamResetError: the client or the daemon broke off.
        """
        headers = await self._daemon.wait_headers()
        if any(name == "grpc-status" for name, _ in headers):
            self._client.end([item for item in headers if item[0].startswith("grpc-")])
            return
        self._to_client.start()
        self._to_daemon.start()
        up = asyncio.ensure_future(_feed(self._client, self._to_client, first))
        down = asyncio.ensure_future(_feed(self._daemon, self._to_daemon, []))
        try:
            done, _ = await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._tasks.close()
            for connection in (self._to_daemon, self._to_client):
                await connection.close(_CLOSE_SECONDS)
            await stop(up, down, expected=(StreamResetError, GrpcError))
        self._daemon.end()
        self._client.end(self._daemon.trailers or [("grpc-status", "0")])

    async def login(self, host: str) -> tuple[str, str]:
        """Ask the client itself for its login at a registry; two empty texts when it has none."""
        request = CredentialsRequest(Host=host).SerializeToString()
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", f"{AUTH}Credentials"),
            (":authority", "localhost"), ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        try:
            async with asyncio.timeout(LOGIN_SECONDS):
                stream = self._to_client.open_stream(headers)
                try:
                    await stream.write([message_prefix(len(request)), request])
                    stream.end()
                    data = await login_answer(stream)
                finally:
                    stream.reset()
            if status_of(stream.trailers or stream.headers) is not None:
                return "", ""
            answer = CredentialsResponse.FromString(b"".join(MessageReader().feed(data)))
        except (StreamResetError, TimeoutError, GrpcError, DecodeError):
            return "", ""
        return answer.Username, answer.Secret

    def _accept(self, stream: Http2Stream) -> None:
        metadata: dict[str, list[str]] = {}
        for name, value in stream.headers:
            metadata.setdefault(name, []).append(value)
        method = metadata.get(":path", [""])[0]
        call = ServerCall(stream, method, metadata, _refused)
        task = self._tasks.start(self._serve(call, stream), name=f"session {method}")
        stream.on_failure = task.cancel

    async def _serve(self, call: ServerCall, stream: Http2Stream) -> None:
        try:
            if call.method == DISCLOSURE:
                request = await call.receive_one()
                with contextlib.suppress(DecodeError):
                    self._asked(GetSecretRequest.FromString(request).ID)
                await self._relay(stream, self._to_client, request)
                return
            if call.method == CHECK_POLICY and self._rules is not None:
                request = await call.receive_one()
                if refusal := refusal_of(self._rules, request):
                    await call.send([refusal])
                    call.finish(OK)
                else:
                    await self._relay(stream, self._to_client, request)
                return
            if not call.method.startswith(AUTH):
                await self._relay(stream, self._to_client, None)
                return
            request = await call.receive_one()
            handler = self._handlers.get(call.method)
            if handler is None or not self._holds(_host_of(call.method, request)):
                await self._relay(stream, self._to_client, request)
                return
            call.put_back(request)
            await handler(call)
            call.finish(OK)
        except asyncio.CancelledError:
            call.finish(CANCELLED, "the call was cancelled")
            raise
        except GrpcError as error:
            call.finish(error.code, error.message, error.details)
        except OffloadError as error:
            call.finish(error.status_code, error.message)
        except ConnectionLostError as error:
            call.finish(UNAVAILABLE, str(error))
        except StreamResetError as error:
            call.finish(CANCELLED, str(error))
        except Exception as error:
            log.error("session.call.failed", method=call.method, exc_info=error)
            call.finish(INTERNAL, "the node failed; its log says more")


async def login_answer(stream: Http2Stream) -> bytes:
    """Return what a client answers about a login.

    Raises:
        GrpcError: it is too much.
        StreamResetError: the client broke off.
    """
    data = b""
    while piece := await stream.read():
        data += piece
        if len(data) > MAX_LOGIN_BYTES:
            raise GrpcError(RESOURCE_EXHAUSTED, "the client sends too much for a login")
    await stream.wait_headers()
    return data


def _host_of(method: str, request: bytes) -> str:
    """Return the registry that a request of the Auth service is about; empty if it is damaged."""
    with contextlib.suppress(DecodeError):
        if method == f"{AUTH}FetchToken":
            return FetchTokenRequest.FromString(request).Host
        # The others have it in the same place.
        return CredentialsRequest.FromString(request).Host
    return ""


async def _feed(stream: Http2Stream, connection: Http2Connection, first: list[bytes]) -> None:
    """Hand what comes out of a Session call to the connection inside it."""
    reader = MessageReader()
    for data in first:
        for message in reader.feed(data):
            connection.feed(BytesMessage.FromString(message).data)
    while data := await stream.read():
        for message in reader.feed(data):
            connection.feed(BytesMessage.FromString(message).data)
        if connection.ended.is_set():
            raise GrpcError(INTERNAL, f"the session broke: {connection.lost or 'HTTP/2 error'}")


def _refused(_method: str, _error: Exception) -> None:
    """Hear of failures that the status of the call tells already."""


def _failed(name: str, error: BaseException) -> None:
    log.error("session.call.failed", method=name, exc_info=error)
