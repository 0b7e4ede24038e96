"""gRPC interceptors shared by gateway and node: errors, versions and limits in one place."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc import aio

from offload_core import API_VERSION
from offload_core.errors import InternalError, OffloadError, VersionError, find_offload_error
from offload_core.status import TRAILER, pack_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

log = structlog.get_logger(__name__)

VERSION_KEY = "offload-api-version"
"""Metadata key that carries the caller's `API_VERSION` in every call."""

MINIMUM_API_VERSION = 1
_STATUS_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def check_version(metadata: Iterable[tuple[str, str | bytes]] | None, *, me: str) -> None:
    """Refuse a caller that speaks an older or newer protocol.

    Raises:
        VersionError: with a sentence that says which side has to be updated.
    """
    given = dict(metadata or ()).get(VERSION_KEY)
    try:
        version = int(given) if given is not None else 0
    except ValueError:
        version = 0
    if version < MINIMUM_API_VERSION:
        raise VersionError(
            f"this command is too old for {me}: it speaks version {version} of the protocol, "
            f"at least {MINIMUM_API_VERSION} is needed; install a newer offload-build"
        )
    if version > API_VERSION:
        raise VersionError(
            f"this command is newer than {me}: it speaks version {version} of the protocol, "
            f"{me} up to {API_VERSION}; ask your administrator to update the service"
        )


class ErrorInterceptor(aio.ServerInterceptor):
    """Turns exceptions of handlers into rich status, logs each call once, counts the running ones.

    `server.stop(grace)` does not wait for handlers that have aborted (grpc issue 37239), so
    `drained()` lets a shutdown wait for all handler code, clean-up included.
    """

    def __init__(self, me: str) -> None:
        """Name this side in sentences, for example "this gateway"."""
        self._me = me
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self, timeout: float) -> bool:
        """Wait until no handler runs; False after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(handler.stream_unary, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream, method),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _unary(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            started = self._begin()
            outcome = "OK"
            try:
                check_version(context.invocation_metadata(), me=self._me)
                return await handler(request, context)
            except BaseException as error:
                outcome = await self._fail(error, context, method)
                raise
            finally:
                self._end(method, started, outcome)

        return call

    def _stream(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            started = self._begin()
            outcome = "OK"
            try:
                check_version(context.invocation_metadata(), me=self._me)
                async for response in handler(request, context):
                    yield response
            except BaseException as error:
                outcome = await self._fail(error, context, method)
                raise
            finally:
                self._end(method, started, outcome)

        return call

    def _begin(self) -> float:
        self._running += 1
        self._idle.clear()
        return time.monotonic()

    def _end(self, method: str, started: float, outcome: str) -> None:
        self._running -= 1
        if self._running == 0:
            self._idle.set()
        log.debug(
            "rpc.completed", method=method, outcome=outcome, seconds=time.monotonic() - started
        )

    async def _fail(
        self, error: BaseException, context: aio.ServicerContext[Any, Any], method: str
    ) -> str:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit, aio.AbortError)):
            return "CANCELLED"
        known = find_offload_error(error)
        if known is None:
            log.error("rpc.failed", method=method, exc_info=error)
            known = InternalError(f"{self._me} failed in {method}; its log says more")
        await abort_with(context, known)
        return known.reason


async def abort_with(context: aio.ServicerContext[Any, Any], error: OffloadError) -> None:
    """End a call with an error that the other side can restore."""
    context.set_trailing_metadata(((TRAILER, pack_status(error)),))
    await context.abort(_STATUS_BY_NUMBER[error.status_code], error.message)


def call_metadata(*extra: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every call of ours carries."""
    return ((VERSION_KEY, str(API_VERSION)), *extra)
