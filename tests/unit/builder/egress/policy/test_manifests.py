"""A cluster never lets pass, by address, what the policy refuses."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
import yaml
from hypothesis import assume, given

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.kubernetes import KINDS, export
from offload_builder.egress.policy.model import Action, Attempt, Protocol
from offload_builder.egress.policy.targets import never_opened
from tests.unit.builder.egress.drawnpolicies import attempts, policies


def lets_pass(spec: dict[str, Any], attempt: Attempt) -> bool:
    denied = spec.get("egressDeny", ())
    return _meant(spec["egress"], attempt) and not _meant(denied, attempt)


def _meant(items: Any, attempt: Attempt) -> bool:
    for item in items:
        blocks = [to["ipBlock"] for to in item.get("to", ()) if "ipBlock" in to]
        blocks += item.get("toCIDRSet", [])
        blocks += [{"cidr": network} for network in item.get("toCIDR", ())]
        ports = [
            *item.get("ports", ()),
            *(p for to in item.get("toPorts", ()) for p in to["ports"]),
        ]
        if any(_within(block, attempt) for block in blocks) and _speaks(ports, attempt):
            return True
    return False


def _within(block: dict[str, Any], attempt: Attempt) -> bool:
    holes = map(ipaddress.ip_network, block.get("except", ()))
    inside = attempt.address in ipaddress.ip_network(block["cidr"])
    return inside and not any(attempt.address in hole for hole in holes)


def _speaks(ports: list[dict[str, Any]], attempt: Attempt) -> bool:
    if not ports:
        return True
    if attempt.protocol not in (Protocol.TCP, Protocol.UDP):
        return False
    for item in ports:
        first = int(item.get("port", 1))
        last = int(item.get("endPort", first if "port" in item else 65535))
        named = item["protocol"] == attempt.protocol.value.upper()
        if named and first <= (attempt.port or 0) <= last:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@given(policy=policies, attempt=attempts)
def test_a_manifest_is_never_wider_than_its_policy(kind, policy, attempt):
    allowed = (rule for rule in policy.rules if rule.action is Action.ALLOW)
    # The reader of policies refuses these.
    assume(not any(never_opened(network) for rule in allowed for network in rule.networks))
    document = yaml.safe_load(export(policy, kinds=(kind,)).text)
    if lets_pass(document["spec"], attempt):
        assert Evaluator(policy).verdict(attempt).allowed
