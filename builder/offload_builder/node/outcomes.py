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
    StepMemoryError,
)
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats
from offload_proto.v1.node_service_pb2 import Failure, Result, Success

_KINDS: tuple[tuple[type[OffloadError], Failure.Kind.ValueType], ...] = (
    (ContextChangedError, Failure.KIND_CONTEXT_CHANGED),
    (ContextError, Failure.KIND_CONTEXT),
    (NodeLostError, Failure.KIND_NODE),
    (QuotaExceededError, Failure.KIND_LIMIT),
    (BuildCanceledError, Failure.KIND_CANCELED),
    (RegistryAuthError, Failure.KIND_REGISTRY_AUTH),
    (StepMemoryError, Failure.KIND_OUT_OF_MEMORY),
)


def failure_of(error: OffloadError) -> Failure:
    """Return an error of the node as clients are told of it."""
    for cls, kind in _KINDS:
        if isinstance(error, cls):
            return Failure(kind=kind, message=error.message)
    return Failure(kind=Failure.KIND_BUILD, message=error.message)


STOPPING = "the node is shutting down"
"""Why a build is ended with its node."""


def interrupted(reason: str, stats: BuildStats) -> tuple[Result, tuple[BuildState.ValueType, str]]:
    """Return how a build ended that did not come to an end of its own, and what is told of it.

    Args:
        reason: who or what ended it; of `STOPPING` nobody wanted it to end.
        stats: its numbers.
    """
    if reason == STOPPING:
        text = "the node was stopped while the build ran; start the build again"
        failure = Failure(kind=Failure.KIND_NODE, message=text, node_lost=True)
        state, reason = BuildState.BUILD_STATE_LOST, text
    else:
        failure = Failure(kind=Failure.KIND_CANCELED, message=reason)
        state = BuildState.BUILD_STATE_CANCELED
    return Result(failure=failure, stats=stats), (state, reason)


def error_of(outcome: Success | Failure) -> OffloadError | None:
    """Return the error that a client makes of a result; None of a good one."""
    if isinstance(outcome, Success):
        return None
    classes = {kind: cls for cls, kind in _KINDS}
    return classes.get(outcome.kind, BuildFailedError)(outcome.message)
