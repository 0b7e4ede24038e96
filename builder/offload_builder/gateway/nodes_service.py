"""NodesService: the standing streams of nodes."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import structlog

from offload_core.aio import TaskSet
from offload_core.errors import InternalError, OffloadError, UsageError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from grpc import aio

    from offload_builder.gateway.access import Access
    from offload_builder.gateway.connectors import ConnectorBoard
    from offload_builder.gateway.history import History
    from offload_builder.gateway.log_book import LogBook
    from offload_builder.gateway.nodeadmission import NodeAdmission
    from offload_builder.gateway.nodes import AttachedNode, Connection, NodeRegistry
    from offload_builder.gateway.sessions.tracking import SessionTracking
    from offload_builder.gateway.tracking import BuildTracking

log = structlog.get_logger(__name__)

HELLO_SECONDS = 10.0

RECENT_PROJECTS = 8


class NodeFeed(Protocol):
    """What nodes are told when they attach, and later at every change."""

    async def greet(self, node: AttachedNode) -> None:
        """Tell a node that has just attached."""


class NodesService(NodesServiceServicer):
    """Passes messages between streams and the registry."""

    def __init__(
        self,
        ticket_public_pem: bytes,
        access: Access,
        nodes: NodeRegistry,
        tracking: BuildTracking,
        logs: LogBook,
        feeds: Sequence[NodeFeed],
        history: History,
        admission: NodeAdmission,
        connectors: ConnectorBoard,
        sessions: SessionTracking,
    ) -> None:
        self._ticket_public_pem = ticket_public_pem
        self._access = access
        self._nodes = nodes
        self._tracking = tracking
        self._logs = logs
        self._feeds = feeds
        self._history = history
        self._admission = admission
        self._connectors = connectors
        self._sessions = sessions

    async def Authorize(  # noqa: N802
        self, request: nodes_pb.AuthorizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> nodes_pb.AuthorizeResponse:
        """Say what a member may do who is connected to a node."""
        return await self._admission.authorize(request, await self._access.node(context))

    async def Admit(  # noqa: N802
        self, request: nodes_pb.AdmitRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[nodes_pb.AdmitResponse]:
        """Queue a build that a node brings, and report its place."""
        caller = await self._access.node(context)
        async with aclosing(self._admission.admit(request, caller)) as news:
            async for message in news:
                yield message

    async def Attach(  # noqa: N802
        self,
        request_iterator: AsyncIterator[nodes_pb.AttachRequest],
        context: aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[nodes_pb.AttachResponse]:
        """Serve one node until it leaves or is lost."""
        caller = await self._access.node(context)
        hello = await _first(request_iterator)
        node = self._nodes.attach(caller.identity.name, caller.token, hello)
        connection = node.connection
        if connection is None:
            raise InternalError("an attached node has no connection")
        readers = TaskSet()
        try:
            welcome = nodes_pb.Welcome(
                ticket_public_key_pem=self._ticket_public_pem,
                recent_project_ids=await self._history.recent_projects(RECENT_PROJECTS),
            )
            interval = round(self._nodes.heartbeat_interval * 1000)
            welcome.heartbeat_interval.FromMilliseconds(interval)
            yield nodes_pb.AttachResponse(welcome=welcome)
            for feed in self._feeds:
                await feed.greet(node)
            await self._tracking.attached(node)
            await self._sessions.greet(node)
            readers.start(
                self._read(request_iterator, node, connection), name=f"node-{node.node_id}"
            )
            while messages := await connection.take():
                for message in messages:
                    yield message
        finally:
            self._nodes.detach(node, connection)
            await readers.close()

    async def _read(
        self,
        requests: AsyncIterator[nodes_pb.AttachRequest],
        node: AttachedNode,
        connection: Connection,
    ) -> None:
        """Take in what a node says; the end of it ends the stream."""
        error: OffloadError | None = None
        try:
            async for request in requests:
                await self._take(node, request)
        except OffloadError as known:
            error = known
        except (grpc.RpcError, asyncio.InvalidStateError) as broken:
            log.debug("node.stream.broken", node_id=node.node_id, error=str(broken))
        except Exception as unexpected:
            log.error("node.stream.failed", node_id=node.node_id, exc_info=unexpected)
            error = InternalError("the gateway failed at a message of this node; see its log")
        finally:
            connection.close(error)

    async def _take(self, node: AttachedNode, request: nodes_pb.AttachRequest) -> None:
        kind = request.WhichOneof("message")
        heartbeat = request.heartbeat if kind == "heartbeat" else None
        self._nodes.heard(node, heartbeat)
        if kind == "offer_reply":
            self._tracking.offer_reply(node, request.offer_reply)
        elif kind == "build_update":
            await self._tracking.updated(node, request.build_update)
        elif kind == "build_log":
            await self._take_log(node, request.build_log)
        elif kind == "cache_task_reply":
            node.take_reply(request.cache_task_reply)
        elif kind == "session_task_reply":
            node.take_session_reply(request.session_task_reply)
        elif kind == "session_update":
            await self._sessions.updated(node, request.session_update)
        elif kind == "connection_wish":
            self._connectors.wish(node, request.connection_wish)
        elif kind == "hello":
            raise UsageError("a node says hello once per stream")

    async def _take_log(self, node: AttachedNode, message: nodes_pb.BuildLog) -> None:
        if await self._tracking.owns(node, message.build_id):
            await self._logs.append(message.build_id, message.batches)
        else:
            log.warning("build.log.refused", build_id=message.build_id, node_id=node.node_id)


async def _first(requests: AsyncIterator[nodes_pb.AttachRequest]) -> nodes_pb.Hello:
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            async for request in requests:
                if request.WhichOneof("message") == "hello":
                    return request.hello
                break
    except TimeoutError as error:
        raise UsageError(f"the node sent no hello within {HELLO_SECONDS:.0f} seconds") from error
    raise UsageError("the first message of a node must be hello")
