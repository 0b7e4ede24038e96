"""`offload.v1.SessionNodeService`: thin; a call is checked, counted and carried."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc.aio import AbortError

from offload_builder.node.services import member_identity
from offload_builder.node.sessions.calls import END_SECONDS
from offload_builder.node.sessions.carrying import ENGINE_END_SECONDS, carry
from offload_builder.node.sessions.datagrams import DatagramPeer
from offload_builder.node.sessions.diagnosis import describe
from offload_builder.node.sessions.socketstream import SocketStream
from offload_core.errors import NodeLostError, QuotaExceededError, UsageError
from offload_core.interceptors import abort_with
from offload_core.pieces import StreamPiece, read_piece, read_port_request, write_piece
from offload_core.sessionmetadata import SESSION_KEY, UNATTENDED_KEY
from offload_proto.v1.session_node_service_pb2 import (
    DESCRIPTOR,
    DiagnoseRequest,
    DiagnoseResponse,
    FollowRequest,
    PortOpen,
    SessionNews,
)
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from offload_builder.node.sessions.calls import SessionCall
    from offload_builder.node.sessions.contract import Engine as DockerEngine
    from offload_builder.node.sessions.contract import EngineStream
    from offload_builder.node.sessions.nodesessions import NodeSessions
    from offload_builder.node.sessions.session import NodeSession

OPEN_SECONDS = 10.0
MAX_FOLLOWERS = 64
"""Of one session."""
DIAGNOSE_SECONDS = 20.0

T = TypeVar("T")
PortMessage = PortOpen | StreamPiece | None
Context = Any  # grpc.aio.ServicerContext with its two type parameters


def called_session(sessions: NodeSessions, context: Context) -> tuple[NodeSession, str]:
    """Return the session that a call is about, and the member who calls.

    Raises:
        NotFoundError: there is none, or it is not theirs.
    """
    member = member_identity(context).name
    return sessions.find(_metadata(context, SESSION_KEY), member), member


class SessionNode:
    """Its sessions are found by name and certificate; who may not use one learns nothing of it."""

    def __init__(self, sessions: NodeSessions) -> None:
        self._sessions = sessions

    def _session(self, context: Context) -> tuple[NodeSession, str]:
        return called_session(self._sessions, context)

    @contextmanager
    def _call(self, context: Context, *, counts: bool) -> Iterator[tuple[NodeSession, SessionCall]]:
        session, member = self._session(context)
        with session.calls.open(member, counts=counts) as call:
            yield session, call

    async def Follow(  # noqa: N802 - name of the RPC
        self, request: FollowRequest, context: Context
    ) -> AsyncIterator[SessionNews]:
        """Tell of a session; see the .proto file."""
        del request
        session, member = self._session(context)
        if session.followers >= MAX_FOLLOWERS:
            raise QuotaExceededError(f"more than {MAX_FOLLOWERS} clients follow this session")
        async with aclosing(session.follow(member)) as news:
            async for message in news:
                yield message

    async def Engine(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[StreamPiece], context: Context
    ) -> AsyncIterator[StreamPiece]:
        """Carry one connection to the engine; see the .proto file."""
        unattended = bool(_metadata(context, UNATTENDED_KEY))
        async with AsyncExitStack() as stack:
            session, call = stack.enter_context(self._call(context, counts=False))
            pieces = await stack.enter_async_context(_closing(request_iterator))
            if session.state == SessionState.SESSION_STATE_PAUSED:
                # One that is kept ready wakes nobody, and neither does one that only looks on.
                if unattended:
                    await call.unless_ended(_woken(session))
                else:
                    first = await call.unless_ended(_first(pieces))
                    if first is None:
                        return
                    call.count()
                    pieces = await stack.enter_async_context(aclosing(_again(first, pieces)))
            stream = await self._open_engine(session)
            stack.push_async_callback(stream.close)
            if unattended:
                call.never_count()
            answers = carry(call, pieces, stream, session.carried, end_seconds=ENGINE_END_SECONDS)
            async with aclosing(_told(answers, call, context)) as messages:
                async for message in messages:
                    yield message

    async def _open_engine(self, session: NodeSession) -> EngineStream:
        await self._awake(session)
        if session.door is None:
            raise NodeLostError("the session has ended")
        return await session.door.open()

    async def _awake(self, session: NodeSession) -> DockerEngine:
        if session.state != SessionState.SESSION_STATE_RUNNING:
            await self._sessions.wake(session)
        if session.engine is None:
            raise NodeLostError("the session has not begun")
        return session.engine

    async def Port(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[PortMessage], context: Context
    ) -> AsyncIterator[StreamPiece]:
        """Carry one connection to a TCP port; see the .proto file."""
        async with AsyncExitStack() as stack:
            session, call = stack.enter_context(self._call(context, counts=True))
            requests = await stack.enter_async_context(_closing(request_iterator))
            wish = await _open(requests)
            engine = await self._awake(session)
            stream = SocketStream(await session.dialer.tcp(engine, wish.host, wish.port))
            stack.push_async_callback(stream.close)
            pieces = await stack.enter_async_context(aclosing(_pieces(requests)))
            answers = carry(call, pieces, stream, session.carried)
            async with aclosing(_told(answers, call, context)) as messages:
                async for message in messages:
                    yield message

    async def Datagrams(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[PortMessage], context: Context
    ) -> AsyncIterator[StreamPiece]:
        """Carry the datagrams of one peer; see the .proto file."""
        async with AsyncExitStack() as stack:
            session, call = stack.enter_context(self._call(context, counts=True))
            requests = await stack.enter_async_context(_closing(request_iterator))
            wish = await _open(requests)
            engine = await self._awake(session)
            connection = await session.dialer.udp(engine, wish.host, wish.port)
            stack.callback(connection.close)
            pieces = await stack.enter_async_context(aclosing(_pieces(requests)))
            answers = DatagramPeer(call, connection, session.carried).carry(pieces)
            async with aclosing(_told(answers, call, context)) as messages:
                async for message in messages:
                    yield message

    async def Diagnose(  # noqa: N802 - name of the RPC
        self, request: DiagnoseRequest, context: Context
    ) -> DiagnoseResponse:
        """Describe the engine; see the .proto file."""
        del request
        session, _ = self._session(context)
        try:
            async with asyncio.timeout(DIAGNOSE_SECONDS):
                return DiagnoseResponse(texts=await describe(session))
        except TimeoutError as error:
            raise NodeLostError("the node could not describe the session in time") from error


def add_session_node(service: SessionNode, server: grpc.aio.Server) -> None:
    """Have a server offer the service; pieces come and go without protobuf."""
    stream, answer = grpc.stream_stream_rpc_method_handler, write_piece
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Follow": grpc.unary_stream_rpc_method_handler(
            service.Follow, FollowRequest.FromString, SessionNews.SerializeToString
        ),
        "Engine": stream(service.Engine, read_piece, answer),
        "Port": stream(service.Port, read_port_request, answer),
        "Datagrams": stream(service.Datagrams, read_port_request, answer),
        "Diagnose": grpc.unary_unary_rpc_method_handler(
            service.Diagnose, DiagnoseRequest.FromString, DiagnoseResponse.SerializeToString
        ),
    }
    name = DESCRIPTOR.services_by_name["SessionNodeService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def _metadata(context: Context, key: str) -> str:
    value = dict(context.invocation_metadata() or ()).get(key, "")
    return value if isinstance(value, str) else ""


def _closing(requests: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncIterator[T]]:
    """Read requests in a block; grpc's iterator is a generator, and complains if left open."""
    found = aiter(requests)
    return aclosing(found) if isinstance(found, AsyncGenerator) else nullcontext(found)


async def _woken(session: NodeSession) -> None:
    """Wait until somebody else wakes a session, or it is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in (session.running, session.over)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()


async def _first(pieces: AsyncIterator[StreamPiece]) -> StreamPiece | None:
    """Return the first piece with something in it; None when there is none."""
    async for piece in pieces:
        if piece.data:
            return piece
        if piece.ended:
            break
    return None


async def _again(
    first: StreamPiece, pieces: AsyncIterator[StreamPiece]
) -> AsyncGenerator[StreamPiece, None]:
    yield first
    async for piece in pieces:
        yield piece


async def _open(requests: AsyncIterator[PortMessage]) -> PortOpen:
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            first = await anext(requests, None)
    except TimeoutError:
        first = None
    if not isinstance(first, PortOpen):
        raise UsageError("the first message of this call must be PortOpen")
    return first


async def _pieces(requests: AsyncIterator[PortMessage]) -> AsyncGenerator[StreamPiece, None]:
    async for request in requests:
        if not isinstance(request, StreamPiece):
            raise UsageError("after PortOpen only pieces can come")
        yield request


async def _told(
    answers: AsyncGenerator[StreamPiece, None], call: SessionCall, context: Context
) -> AsyncGenerator[StreamPiece, None]:
    """Yield answers; a client that takes nothing hears nevertheless why the node ends the call."""
    async with AsyncExitStack() as stack:
        messages = await stack.enter_async_context(aclosing(answers))
        try:
            async for message in messages:
                yield message
        except GeneratorExit:
            if call.error is not None:
                with suppress(TimeoutError, AbortError):
                    async with asyncio.timeout(END_SECONDS):
                        await abort_with(context, call.error)
            raise
