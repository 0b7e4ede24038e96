"""gRPC interceptors shared by gateway and node: errors, versions and limits in one place."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc import aio

from offload_core.errors import InternalError, OffloadError, find_offload_error
from offload_core.status import TRAILER, clipped, pack_status
from offload_core.versions import check_version

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

log = structlog.get_logger(__name__)

_STATUS_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


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
                outcome, known = self._classify(error, method)
                if known is not None:
                    await abort_with(context, known)
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
                # A handler that is left in the middle must clean up now, not at collection.
                async with aclosing(handler(request, context)) as responses:
                    async for response in responses:
                        yield response
            except BaseException as error:
                outcome, known = self._classify(error, method)
                if known is not None:
                    await abort_with(context, known)
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

    def _classify(self, error: BaseException, method: str) -> tuple[str, OffloadError | None]:
        """Return the outcome for the log, and the error to answer with, if any."""
        if isinstance(error, (asyncio.CancelledError, GeneratorExit, aio.AbortError)):
            return "CANCELLED", None
        known = find_offload_error(error)
        if known is None:
            log.error("rpc.failed", method=method, exc_info=error)
            known = InternalError(f"{self._me} failed in {method}; its log says more")
        return known.reason, known


async def abort_with(context: aio.ServicerContext[Any, Any], error: OffloadError) -> None:
    """End a call with an error that the other side can restore."""
    error = clipped(error)
    context.set_trailing_metadata(((TRAILER, pack_status(error)),))
    await context.abort(_STATUS_BY_NUMBER[error.status_code], error.message)
