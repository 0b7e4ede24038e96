"""EgressService: policies for administrators, and what holds for members."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.egress.policy.explain import explain
from offload_builder.egress.policy.model import Posture, Protocol
from offload_builder.egress.policy.targets import parse_attempt
from offload_core.errors import InvalidValueError, UsageError
from offload_proto.v1 import egress_service_pb2 as egress_pb
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceServicer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from grpc import aio

    from offload_builder.egress.policy.differences import Change
    from offload_builder.egress.policy.model import Attempt, Rule
    from offload_builder.gateway.access import Access, Caller
    from offload_builder.gateway.egressfeed import EgressFeed
    from offload_builder.gateway.egresslearning import EgressLearning
    from offload_builder.gateway.egresspolicies import Applied, EgressPolicies, StoredPolicy
    from offload_builder.gateway.history import History
    from offload_builder.gateway.members import Members

log = structlog.get_logger(__name__)

MAX_LEARNED = 50
"""Builds in one question."""
MAX_USES = 2000
"""In one answer."""


class EgressService(EgressServiceServicer):
    """Unpacks, authorises, calls, packs."""

    def __init__(
        self,
        access: Access,
        members: Members,
        policies: EgressPolicies,
        feed: EgressFeed,
        history: History,
        learning: EgressLearning,
    ) -> None:
        self._access = access
        self._members = members
        self._policies = policies
        self._feed = feed
        self._history = history
        self._learning = learning

    async def ApplyPolicy(  # noqa: N802
        self, request: egress_pb.ApplyPolicyRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.ApplyPolicyResponse:
        """Check a policy and let it hold."""
        caller = await self._access.member(context)
        caller.check_admin("change what builds may reach")
        await self._exists(caller, request.project_id)
        applied = await self._policies.apply(
            request.project_id,
            request.text,
            file=request.file or "policy.toml",
            author=caller.token.name,
            note=request.note,
            expected=request.expected_version,
            dry_run=request.dry_run,
        )
        if not request.dry_run:
            _log(request.project_id, applied, caller)
            await self._feed.refresh()
        return egress_pb.ApplyPolicyResponse(
            version=applied.version,
            changes=_changes(applied.changes),
            warnings=[str(item) for item in applied.warnings],
        )

    async def RollbackPolicy(  # noqa: N802
        self, request: egress_pb.RollbackPolicyRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.RollbackPolicyResponse:
        """Let an earlier version hold again."""
        caller = await self._access.member(context)
        caller.check_admin("change what builds may reach")
        await self._exists(caller, request.project_id)
        applied = await self._policies.rollback(
            request.project_id, request.version, author=caller.token.name
        )
        _log(request.project_id, applied, caller)
        await self._feed.refresh()
        return egress_pb.RollbackPolicyResponse(
            version=applied.version, changes=_changes(applied.changes)
        )

    async def ListPolicyVersions(  # noqa: N802
        self, request: egress_pb.ListPolicyVersionsRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.ListPolicyVersionsResponse:
        """Return versions, newest first."""
        caller = await self._access.member(context)
        caller.check_admin("list versions of policies")
        await self._exists(caller, request.project_id)
        if request.version:
            found = [await self._policies.get(request.project_id, request.version)]
        else:
            found = await self._policies.versions(request.project_id)
            if request.with_text:
                # Texts of all versions would be too much for one message.
                found = found[:1]
        return egress_pb.ListPolicyVersionsResponse(
            versions=[_version(item, with_text=request.with_text) for item in found]
        )

    async def GetPolicy(  # noqa: N802
        self, request: egress_pb.GetPolicyRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.GetPolicyResponse:
        """Return what holds for a project."""
        caller = await self._access.member(context)
        await self._visible(caller, request.project_id)
        merged, version = await self._policies.merged(request.project_id)
        policy = merged.policy
        return egress_pb.GetPolicyResponse(
            posture=(policy.posture or Posture.OPEN).value,
            pool=policy.name,
            contact=policy.contact,
            pool_version=policy.version,
            project_version=version,
            rules=[_rule(rule) for rule in policy.rules],
            refused=[str(item) for item in merged.refused],
        )

    async def ExplainEgress(  # noqa: N802
        self, request: egress_pb.ExplainEgressRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.ExplainEgressResponse:
        """Say why something is allowed or not."""
        caller = await self._access.member(context)
        await self._visible(caller, request.project_id)
        attempt = _attempt(request)
        merged, _ = await self._policies.merged(request.project_id)
        told = explain(merged.policy, attempt)
        return egress_pb.ExplainEgressResponse(
            allowed=told.verdict.allowed,
            rule_id=told.verdict.rule_id,
            rule_text=told.verdict.rule_text,
            place=str(told.verdict.place),
            reason=told.verdict.reason,
            layer=told.verdict.layer.value,
            notes=told.notes,
            ask=told.ask,
            proposal=told.proposal,
        )

    async def LearnPolicy(  # noqa: N802
        self, request: egress_pb.LearnPolicyRequest, context: aio.ServicerContext[Any, Any]
    ) -> egress_pb.LearnPolicyResponse:
        """Say what builds did in the network, and propose a policy for it."""
        caller = await self._access.member(context)
        if not 1 <= len(request.build_ids) <= MAX_LEARNED:
            raise UsageError(f"name 1 to {MAX_LEARNED} builds to learn from")
        build_ids: list[str] = []
        for prefix in request.build_ids:
            record = await self._history.resolve(prefix, caller.visible_projects())
            build_ids.append(record.build_id)
            if record.group_id:
                build_ids += await self._learning.parts(record.group_id, record.project_id)
        learned = await self._learning.of_builds(build_ids, follow=True)
        text = await asyncio.to_thread(learned.proposal, with_refused=request.with_refused)
        uses = sorted(learned.uses, key=lambda item: item.use.allowed)
        return egress_pb.LearnPolicyResponse(
            text=text,
            uses=[egress_pb.NetworkUse(**item._asdict()) for item in uses[:MAX_USES]],
            more=len(uses) > MAX_USES,
        )

    async def _visible(self, caller: Caller, project_id: str) -> None:
        if not project_id and not caller.token.is_admin:
            raise UsageError("name a project; set it with --project or in offload.toml")
        if project_id:
            caller.token.check_project(project_id)
        await self._exists(caller, project_id)

    async def _exists(self, caller: Caller, project_id: str) -> None:
        if project_id:
            await self._members.project(project_id, visible_to=caller.token)


def _log(project_id: str, applied: Applied, caller: Caller) -> None:
    log.info(
        "egress.policy.applied",
        scope=project_id or "pool",
        version=applied.version,
        changes=len(applied.changes),
        by=caller.token.name,
    )


def _attempt(request: egress_pb.ExplainEgressRequest) -> Attempt:
    try:
        protocol = Protocol(request.protocol or "tcp")
        address = ipaddress.ip_address(request.address) if request.address else None
    except ValueError as error:
        raise InvalidValueError(str(error)) from error
    found = parse_attempt(request.target, protocol)
    if address is None or found.host is None:
        return found
    return replace(found, address=address)


def _changes(changes: Iterable[Change]) -> list[egress_pb.PolicyChange]:
    return [egress_pb.PolicyChange(**change.record()) for change in changes]


def _version(item: StoredPolicy, *, with_text: bool) -> egress_pb.PolicyVersion:
    message = egress_pb.PolicyVersion(
        version=item.version,
        file=item.file,
        author=item.author,
        note=item.note,
        text=item.text if with_text else "",
    )
    message.applied_at.FromDatetime(item.applied_at)
    return message


def _rule(rule: Rule) -> egress_pb.EgressRule:
    message = egress_pb.EgressRule(
        rule_id=rule.id,
        text=str(rule),
        layer=rule.layer.value,
        place=str(rule.place),
        comment=rule.comment,
        owner=rule.owner,
        preset=rule.preset,
    )
    if rule.expires is not None:
        message.expires_at.FromDatetime(rule.expires)
    return message
