"""How a build ended: our errors as results on the wire, and back."""

from __future__ import annotations

from offload_core.errors import (
    BuildCanceledError,
    BuildFailedError,
    ContextChangedError,
    ContextError,
    NodeLostError,
    OffloadError,
    QuotaExceededError,
    RegistryAuthError,
)
from offload_proto.v1.node_service_pb2 import Failure, Success

_KINDS: tuple[tuple[type[OffloadError], Failure.Kind.ValueType], ...] = (
    (ContextChangedError, Failure.KIND_CONTEXT_CHANGED),
    (ContextError, Failure.KIND_CONTEXT),
    (NodeLostError, Failure.KIND_NODE),
    (QuotaExceededError, Failure.KIND_LIMIT),
    (BuildCanceledError, Failure.KIND_CANCELED),
    (RegistryAuthError, Failure.KIND_REGISTRY_AUTH),
)


def failure_of(error: OffloadError) -> Failure:
    """Return an error of the node as clients are told of it."""
    for cls, kind in _KINDS:
        if isinstance(error, cls):
            return Failure(kind=kind, message=error.message)
    return Failure(kind=Failure.KIND_BUILD, message=error.message)


def error_of(outcome: Success | Failure) -> OffloadError | None:
    """Return the error that a client makes of a result; None of a good one."""
    if isinstance(outcome, Success):
        return None
    classes = {kind: cls for cls, kind in _KINDS}
    return classes.get(outcome.kind, BuildFailedError)(outcome.message)
