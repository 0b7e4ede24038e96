"""Failed calls to the node: what to tell, and whether only the way to it is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from offload_core.errors import NodeLostError, OffloadError
from offload_core.status import TRAILER, error_from_rpc

if TYPE_CHECKING:
    from offload_core.status import RpcFailure

_FAILED_WRITE = "Internal error from Core"
"""What grpc.aio makes of a connection that breaks while a message is written, instead of
UNAVAILABLE. Source: grpc/_cython/_cygrpc/aio/call.pyx.pxi, set_internal_error."""


def node_error(failure: RpcFailure) -> OffloadError:
    """Return the error behind a failed call to the node.

    A `NodeLostError` says whether the connection broke or the node itself gave up.
    """
    if failure.code() is grpc.StatusCode.INTERNAL and failure.details() == _FAILED_WRITE:
        error: OffloadError = NodeLostError("the connection to the node broke")
    else:
        error = error_from_rpc(failure, peer="the node", unreachable=NodeLostError)
    if isinstance(error, NodeLostError):
        said = any(key == TRAILER for key, _ in failure.trailing_metadata() or ())
        error.connection_broke = not said
    return error
