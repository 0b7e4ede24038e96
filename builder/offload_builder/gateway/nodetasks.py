"""Work on the layer cache that the gateway asks of nodes over their standing streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_builder.gateway.tokens import random_id
from offload_core.errors import InternalError, NodeLostError, OffloadError, error_for_reason
from offload_core.units import format_duration
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode

MAX_OPEN_TASKS = 100
"""Per node; who asks for more has to wait for answers first."""


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
    if len(node.tasks) >= MAX_OPEN_TASKS:
        raise NodeLostError(f"node {node.node_id} has too many questions to answer")
    request = nodes_pb.CacheTask()
    request.CopyFrom(task)
    request.task_id = random_id()
    answer: asyncio.Future[nodes_pb.CacheTaskReply] = asyncio.get_running_loop().create_future()
    node.tasks[request.task_id] = answer
    try:
        if not node.post(nodes_pb.AttachResponse(cache_task=request)):
            raise NodeLostError(f"node {node.node_id} is not connected")
        async with asyncio.timeout(timeout):
            reply = await answer
    except TimeoutError as error:
        raise NodeLostError(
            f"node {node.node_id} did not answer within {format_duration(timeout)}"
        ) from error
    finally:
        node.tasks.pop(request.task_id, None)
    if reply.error:
        raise error_of(reply)
    return reply


def error_of(reply: nodes_pb.CacheTaskReply) -> OffloadError:
    """Return the error that a node answers with."""
    cls = error_for_reason(reply.error_reason) or InternalError
    return cls(reply.error[:1000])
