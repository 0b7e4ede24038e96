"""The session service that is asked about the sources of a build.

Source: BuildKit's sourcepolicy/policysession and solver/llbsolver/policy.go. A solve names the
session; without that nobody is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.providers import SourceUse
from offload_proto.buildkit.policysession_pb2 import (
    CheckPolicyRequest,
    CheckPolicyResponse,
    DecisionResponse,
    DenyMessage,
    PolicyAction,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.providers import SourceRules

CHECK_POLICY = "/moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier/CheckPolicy"


def policy_services(rules: SourceRules) -> dict[str, Callable[[ServerCall], Awaitable[None]]]:
    """Return the handlers of the PolicyVerifier service by method name."""

    async def check(call: ServerCall) -> None:
        refusal = refusal_of(rules, await call.receive_one())
        await call.send([refusal or _ALLOWED])

    return {CHECK_POLICY: check}


def refusal_of(rules: SourceRules, request: bytes) -> bytes:
    """Return the answer to a serialised CheckPolicyRequest that is refused; empty when it is not.

    Raises:
        DecodeError: the request is damaged.
    """
    source = CheckPolicyRequest.FromString(request).Source.Source
    reason = rules.check(SourceUse(source.identifier, dict(source.attrs)))
    if not reason:
        return b""
    decision = DecisionResponse(
        action=PolicyAction.DENY, denyMessages=[DenyMessage(message=reason)]
    )
    return CheckPolicyResponse(decision=decision).SerializeToString()


_ALLOWED = CheckPolicyResponse(
    decision=DecisionResponse(action=PolicyAction.ALLOW)
).SerializeToString()
