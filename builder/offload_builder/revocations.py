"""Tokens whose certificates are worth nothing any more: refused at every call, open calls ended.

The gateway reads them from its database and sends them to its nodes; both check each call. An entry
is kept until the last certificate of its token has ended by itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc import aio

from offload_core.errors import AuthenticationError
from offload_core.interceptors import abort_with
from offload_core.smallfile import replace_small_file
from offload_core.tls import Identity, peer_identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from offload_proto.v1.nodes_service_pb2 import AttachResponse

log = structlog.get_logger(__name__)

END_SECONDS = 2.0
MAX_REVOCATIONS = 50_000
"""About 2 MB in a message; those that last longest are kept, and more is logged as an error."""


@dataclass(eq=False)
class _Call:
    """One open call of a holder of a certificate."""

    task: asyncio.Task[Any]
    cancelling: int
    """Cancellations that somebody else had asked for before ours."""
    revoked: bool = False


class Revocations:
    """What is known of revoked tokens, in one small file; belongs to the event loop."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what an earlier process wrote; a file that cannot be read counts as empty.

        Args:
            path: of the file; None for none, where a database has it.
        """
        self._path = path
        self._until: dict[str, float] = {}
        self._calls: dict[str, set[_Call]] = {}
        self._listeners: list[Callable[[frozenset[str]], None]] = []
        if path is not None:
            self._until = _read(path)

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._until

    def __len__(self) -> int:
        return len(self._until)

    def on_revoked(self, listener: Callable[[frozenset[str]], None]) -> None:
        """Call `listener` with the ids that were added, after every change that adds some."""
        self._listeners.append(listener)

    def take_message(self, message: AttachResponse) -> None:
        """Do as `take` with what the gateway says over the stream of a node."""
        self.take(
            {item.token_id: float(item.until.seconds) for item in message.revocations.revocations}
        )

    def take(self, until: Mapping[str, float]) -> None:
        """Replace all entries, and end the open calls of new ones.

        Args:
            until: by token, when its last certificate has ended, in seconds since 1970.
        """
        known = bounded(until)
        if known == self._until:
            return
        added = frozenset(known.keys() - self._until.keys())
        self._until = known
        if self._path is not None:
            self._write(self._path)
        if added:
            log.info("token.revocations.taken", added=len(added), tokens=len(known))
            for token_id in added:
                self._end_calls(token_id)
            for listener in self._listeners:
                listener(added)

    def check(self, token_id: str) -> None:
        """Refuse the holder of a certificate whose token was revoked.

        Raises:
            AuthenticationError: it was.
        """
        if token_id in self._until:
            raise AuthenticationError(
                f"the token {token_id} behind this certificate was revoked",
                hint="ask an administrator for a new token, then run: offload login",
            )

    @contextmanager
    def call(self, token_id: str) -> Iterator[None]:
        """Work for the holder of a certificate in the current task, until the token is revoked.

        Raises:
            AuthenticationError: it was revoked before, or while the block ran.
        """
        self.check(token_id)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls are watched in tasks only")
        call = _Call(task, task.cancelling())
        self._calls.setdefault(token_id, set()).add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.revoked and task.uncancel() <= call.cancelling:
                self.check(token_id)
            raise
        finally:
            open_calls = self._calls[token_id]
            open_calls.discard(call)
            if not open_calls:
                del self._calls[token_id]

    def _end_calls(self, token_id: str) -> None:
        for call in self._calls.get(token_id, ()):
            if not call.revoked:
                call.revoked = True
                call.task.cancel()

    def _write(self, path: Path) -> None:
        try:
            replace_small_file(path, json.dumps(self._until).encode(), durable=True)
        except OSError as error:
            # The gateway tells them again at the next start.
            log.warning("token.revocations.not_kept", path=str(path), cause=str(error))


def bounded(until: Mapping[str, float]) -> dict[str, float]:
    """Return the entries that still count, at most `MAX_REVOCATIONS`."""
    now = time.time()
    known = {key: end for key, end in until.items() if end > now}
    if len(known) > MAX_REVOCATIONS:
        log.error("token.revocations.too_many", tokens=len(known), kept=MAX_REVOCATIONS)
        longest = sorted(known, key=lambda key: known[key], reverse=True)[:MAX_REVOCATIONS]
        known = {key: known[key] for key in longest}
    return known


def _read(path: Path) -> dict[str, float]:
    try:
        raw = json.loads(path.read_text("utf-8"))
        return {str(key): float(end) for key, end in raw.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("token.revocations.unreadable", path=str(path), cause=str(error))
        return {}


class RevocationGate(aio.ServerInterceptor):
    """Refuses calls behind a revoked token, and ends those that are open when it is revoked.

    It belongs outside of all others. Calls without a certificate of ours go through: whether they
    need one is the handler's business.
    """

    def __init__(self, revocations: Revocations) -> None:
        self._revocations = revocations

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        serialisers = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary), *serialisers
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(handler.stream_unary), *serialisers
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream), *serialisers
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream), *serialisers
        )

    def _unary(self, handler: Any) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            identity = _identity(context)
            if identity is None:
                return await handler(request, context)
            try:
                with self._revocations.call(identity.token_id):
                    return await handler(request, context)
            except AuthenticationError as error:
                return await _end(context, error)

        return call

    def _stream(self, handler: Any) -> Any:
        # Not a generator, for which gRPC writes: a write that waits for a client that does not
        # read must end here as well.
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
            identity = _identity(context)
            try:
                with self._revocations.call(identity.token_id) if identity else nullcontext():
                    async with aclosing(handler(request, context)) as responses:
                        async for response in responses:
                            await context.write(response)
            except AuthenticationError as error:
                await _end(context, error)

        return call


async def _end(context: aio.ServicerContext[Any, Any], error: AuthenticationError) -> None:
    # What was being written comes first, and a client that does not read may never take it.
    with suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            await abort_with(context, error)


def _identity(context: aio.ServicerContext[Any, Any]) -> Identity | None:
    try:
        return peer_identity(context)
    except AuthenticationError:
        return None
