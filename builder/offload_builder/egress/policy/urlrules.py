"""Decides URLs by a policy.

1. The server must be one that connections may reach, see `evaluate`.
2. A rule that denies the URL wins over every rule that allows it, or its host.
3. A rule that allows the URL counts next, then rules by host, and at last the posture.

Where rules name URLs of a server, a URL of it that servers may understand differently is refused.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.egress.policy.connections import without_urls
from offload_builder.egress.policy.evaluate import DEFAULT_DENY, Evaluator, rule_order
from offload_builder.egress.policy.model import Action, Attempt, EffectivePolicy, Layer, Verdict
from offload_builder.egress.policy.tables import TargetTable
from offload_builder.egress.policy.weburl import AmbiguousUrlError, folded, normal_path

if TYPE_CHECKING:
    from offload_builder.egress.policy.model import Policy, ProtectedRange, Rule
    from offload_builder.egress.policy.weburl import UrlTarget, WebUrl

AMBIGUOUS = "ambiguous-url"


class UrlEvaluator:
    """One policy, ready for many questions about URLs.

    Args:
        policy: what holds.
        guarded: addresses of the service itself, which no rule opens.

    Attributes:
        servers: decides what connections and lookups of names may reach.
    """

    def __init__(
        self, policy: Policy | EffectivePolicy, guarded: tuple[ProtectedRange, ...] = ()
    ) -> None:
        effective = policy if isinstance(policy, EffectivePolicy) else EffectivePolicy(policy)
        self.servers = Evaluator(effective, guarded)
        self._parts = [_Part(effective.base, guarded)]
        self._parts += [_Part(item, ()) for item in effective.narrowed_by]

    def verdict(self, attempt: Attempt, now: datetime | None = None) -> Verdict:
        """Return what the policy says about an attempt.

        One without a URL is no HTTP: rules by URL do not allow it.
        """
        moment = now or datetime.now(UTC)
        if attempt.host is not None:
            named = self.servers.name(attempt.host, moment)
            if not named.allowed:
                return named
        server = self.servers.verdict(attempt, moment)
        if not server.allowed:
            return server
        found = [part.verdict(attempt, moment) for part in self._parts]
        return next((item for item in found if not item.allowed), found[0])


class _Part:
    """One of the policies that must all agree."""

    def __init__(self, policy: Policy, guarded: tuple[ProtectedRange, ...]) -> None:
        self._urls = TargetTable(rule for rule in policy.rules if rule.urls)
        self._rest = Evaluator(without_urls(policy), guarded)

    def verdict(self, attempt: Attempt, now: datetime) -> Verdict:
        near: list[tuple[UrlTarget, Rule]] = []
        if (url := attempt.url) is not None:
            near = [
                (target, rule) for target, rule in self._urls.of_server(url) if rule.holds_at(now)
            ]
            near.sort(key=lambda item: rule_order(item[1]))
            if near and (decided := _by_url(url, near)) is not None:
                return decided
        rest = self._rest.verdict(attempt, now)
        if rest.rule_id == DEFAULT_DENY and near:
            rule = near[0][1]
            hint = f'; the rule "{rule.id}" ({rule.place}) is about other URLs of this server'
            return replace(rest, reason=rest.reason + hint)
        return rest


def _by_url(url: WebUrl, near: list[tuple[UrlTarget, Rule]]) -> Verdict | None:
    """Return the word of the rules that name something of the server of a URL; None for none."""
    try:
        path = normal_path(url.path)
    except AmbiguousUrlError as error:
        first = near[0][1]
        reason = f'{url} is refused because of the rule "{first.id}": {error}'
        text = f"{first}; URLs that can be read in one way only"
        return Verdict(False, AMBIGUOUS, text, first.place, reason, first.layer)
    loosely = folded(path)
    denying = (rule for target, rule in near if _denies(target, rule, loosely))
    allowing = (rule for target, rule in near if _allows(target, rule, path))
    for rule, verb in ((next(denying, None), "denies"), (next(allowing, None), "allows")):
        if rule is not None:
            whose = "" if rule.layer is Layer.POOL else f" of the {rule.layer.value}"
            comment = f" ({rule.comment})" if rule.comment else ""
            reason = f'the rule "{rule.id}"{whose} {verb} {url}{comment}'
            allowed = rule.action is Action.ALLOW
            return Verdict(allowed, rule.id, str(rule), rule.place, reason, rule.layer)
    return None


def _denies(target: UrlTarget, rule: Rule, path: str) -> bool:
    return rule.action is Action.DENY and target.denies(path)


def _allows(target: UrlTarget, rule: Rule, path: str) -> bool:
    return rule.action is Action.ALLOW and target.allows(path)
