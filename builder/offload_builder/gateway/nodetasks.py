"""Work that the gateway asks of nodes over their standing streams: on caches and on sessions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.tokens import random_id
from offload_core.errors import InternalError, NodeLostError, OffloadError, error_for_reason
from offload_core.units import format_duration
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode

R = TypeVar("R")

MAX_OPEN_TASKS = 100
"""Per node and kind; who asks for more has to wait for answers first."""
MAX_ERROR = 1000
"""Characters of a node's sentence."""


async def ask_node(
    node: AttachedNode, task: nodes_pb.CacheTask, timeout: float
) -> nodes_pb.CacheTaskReply:
    """Ask one node and return its answer.

    Args:
        node: whom to ask.
        task: what to do; its task_id is set here.
        timeout: seconds to wait; the node may finish later all the same.

    Raises:
        NodeLostError: the node does not answer in time, or is not connected.
        OffloadError: what the node says instead of an answer.
    """
    request = nodes_pb.CacheTask()
    request.CopyFrom(task)
    request.task_id = random_id()
    message = nodes_pb.AttachResponse(cache_task=request)
    reply = await _ask(node, node.tasks, request.task_id, message, timeout)
    if reply.error:
        raise error_of(reply)
    return reply


async def ask_session(
    node: AttachedNode, task: nodes_pb.SessionTask, timeout: float
) -> nodes_pb.SessionTaskReply:
    """Do as `ask_node` with work on a session.

    Raises:
        NodeLostError: the node does not answer in time, or is not connected.
        OffloadError: what the node says instead of an answer.
    """
    request = nodes_pb.SessionTask()
    request.CopyFrom(task)
    request.task_id = random_id()
    message = nodes_pb.AttachResponse(session_task=request)
    reply = await _ask(node, node.session_tasks, request.task_id, message, timeout)
    if reply.error:
        raise error_of(reply)
    return reply


async def _ask(
    node: AttachedNode,
    open_tasks: dict[str, asyncio.Future[R]],
    task_id: str,
    message: nodes_pb.AttachResponse,
    timeout: float,
) -> R:
    if len(open_tasks) >= MAX_OPEN_TASKS:
        raise NodeLostError(f"node {node.node_id} has too many questions to answer")
    answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
    open_tasks[task_id] = answer
    try:
        if not node.post(message):
            raise NodeLostError(f"node {node.node_id} is not connected")
        async with asyncio.timeout(timeout):
            return await answer
    except TimeoutError as error:
        raise NodeLostError(
            f"node {node.node_id} did not answer within {format_duration(timeout)}"
        ) from error
    finally:
        open_tasks.pop(task_id, None)


def error_of(reply: nodes_pb.CacheTaskReply | nodes_pb.SessionTaskReply) -> OffloadError:
    """Return the error that a node answers with."""
    cls = error_for_reason(reply.error_reason) or InternalError
    return cls(plain_line(reply.error, MAX_ERROR))
