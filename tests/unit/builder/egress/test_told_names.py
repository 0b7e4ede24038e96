"""What is told of connections that asked for a name they may not reach."""

from __future__ import annotations

import ipaddress
import time

from offload_builder.egress.firewall.lifecycle import Connection
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.model import Protocol
from offload_builder.egress.resolver.contract import Answered
from offload_builder.node.egresstold import CHECK_RULE, EgressTold, Told
from tests.fixtures.nameserver import allowing

ADDRESS = "203.0.113.5"


def told(asked: str, why: str = "") -> Told:
    heard: list[Told] = []
    desk = EgressTold()
    desk.listeners.append(heard.append)
    desk.answered(Answered(time.time(), "shop", "100.64.8.2", "good.test", "test", (ADDRESS,)))
    source, address = ipaddress.ip_address("100.64.8.2"), ipaddress.ip_address(ADDRESS)
    policy = allowing("good.test")
    desk.connection(
        Connection(
            time.time(), "shop", Stage.NAME, source, True, address, 443, Protocol.TCP, policy,
            asked, why,
        )
    )  # fmt: skip
    return heard[-1]


def test_the_name_within_is_told_with_its_rule():
    found = told("evil.test")
    assert (str(found), found.verdict.allowed) == ("evil.test:443", False)
    assert found.verdict.rule_id == "default-deny"


def test_a_connection_without_a_name_is_told_with_the_reason():
    found = told("", "TLS does not say which name it asks for")
    assert (str(found), found.verdict.allowed) == ("good.test:443", False)
    assert found.verdict.rule_id == CHECK_RULE
    assert "does not say" in found.verdict.reason
