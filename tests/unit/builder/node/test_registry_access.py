"""What a node may reach when it pushes for a build."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_builder.egress.policy.merging import narrow
from offload_builder.egress.policy.model import (
    CONNECTOR,
    Action,
    EffectivePolicy,
    HostTarget,
    Layer,
    NetworkTarget,
    Policy,
    Posture,
    ProtectedRange,
    Rule,
    Verdict,
)
from offload_builder.egress.urls.urlpolicy import UrlPolicy
from offload_builder.node.registryaccess import RegistryAccess, RegistryJudge
from offload_builder.node.registryrules import local_registries, registry_rules
from offload_cache.mirror.connection import Endpoint
from offload_core.errors import AccessDeniedError

PUBLIC, PRIVATE, METADATA, OWN = "203.0.113.9", "10.1.2.3", "169.254.169.254", "198.51.100.7"
GUARDED = (ProtectedRange("node", ip_network(OWN), "the node itself", openable=False),)
SETTINGS = {
    "corp.example:5000": RegistrySettings(mirrors=("mirror.example/hub",)),
    "localhost:5000": RegistrySettings(http=True),
    "127.0.0.1:5001": RegistrySettings(http=True),
}
TOLD: list[tuple[str, str, int, str]] = []
RULES = registry_rules(None, SETTINGS)


def access(*rules: Rule, posture: Posture = Posture.OPEN, narrowed: Policy | None = None):
    base = Policy(posture=posture, rules=rules).with_rules(RULES)
    whole = narrow(base, narrowed) if narrowed is not None else EffectivePolicy(base)
    policy = UrlPolicy(whole, guarded=GUARDED)

    def tell(host: str, address: str, port: int, verdict: Verdict) -> None:
        assert not verdict.allowed
        TOLD.append((host, address, port, verdict.rule_id))

    judge = RegistryJudge(lambda: policy, tell, local_registries(RULES))
    return RegistryAccess(Endpoint, judge)


def reason(one: RegistryAccess, host: str, address: str = "", port: int = 443) -> str:
    assert one.judge is not None
    return one.judge(host, ip_address(address) if address else None, port)


def test_nothing_is_judged_where_nothing_is_enforced():
    one = RegistryAccess(Endpoint)
    assert one.judge is None
    assert one.endpoint("localhost:5000", "app").address == "localhost:5000"


@pytest.mark.parametrize("host", ["any.example", METADATA, "::ffff:10.1.2.3", "::1"])
@pytest.mark.parametrize("address", [METADATA, PRIVATE, "127.0.0.1", "::1", "::ffff:a01:203", OWN])
def test_protected_addresses_are_refused_without_a_policy(host, address):
    assert "is protected" in reason(access(), host, address)
    assert "(rule protected-" in reason(access(), host, address)


def test_a_name_that_leads_to_the_internet_is_allowed_without_a_policy():
    assert reason(access(), "any.example") == reason(access(), "any.example", PUBLIC) == ""
    assert reason(access(), PUBLIC) == reason(access(), "2001:db8::1") == ""
    assert "is protected" in reason(access(), PRIVATE)
    assert "neither a name nor an address" in reason(access(), "127.1")


def test_configured_registries_may_be_private_at_their_port():
    for posture in Posture:
        one = access(posture=posture)
        assert reason(one, "corp.example", PRIVATE, 5000) == ""
        assert reason(one, "mirror.example", PRIVATE, 443) == ""
        assert reason(one, "corp.example", PRIVATE, 8000)
        for address in (METADATA, "127.0.0.1", OWN):
            assert "is protected" in reason(one, "corp.example", address, 5000)


def test_registries_on_the_node_are_reached_where_the_configuration_says_so():
    one = access()
    assert reason(one, "localhost", port=5000) == reason(one, "localhost", "127.0.0.1", 5000) == ""
    assert reason(one, "127.0.0.1", "127.0.0.1", 5001) == ""
    assert one.endpoint("127.0.0.1:5001", "app").address == "127.0.0.1:5001"
    for host, port in (("localhost", 5001), ("127.0.0.1", 5000), ("127.0.0.2", 5001)):
        assert "is protected" in reason(one, host, "127.0.0.1", port)
    denied = access(Rule("no", Action.DENY, (HostTarget("localhost"),)))
    assert 'the rule "no" denies' in reason(denied, "localhost", "127.0.0.1", 5000)


def test_rules_count_for_names_and_addresses():
    one = access(
        Rule("yes", Action.ALLOW, (HostTarget("reg.example"),)),
        Rule("lan", Action.ALLOW, (NetworkTarget(ip_network("10.1.0.0/16")),)),
        Rule("no", Action.DENY, (NetworkTarget(ip_network("203.0.113.64/26")),)),
        posture=Posture.ALLOWLIST,
    )
    assert reason(one, "reg.example", PUBLIC) == reason(one, PRIVATE, PRIVATE) == ""
    assert reason(one, "reg.example", PRIVATE) == ""
    assert 'the rule "no" denies' in reason(one, "reg.example", "203.0.113.66")
    assert "(rule default-deny:" in reason(one, "cdn.example")
    assert TOLD[-2:] == [
        ("reg.example", "203.0.113.66", 443, "no"),
        ("cdn.example", "", 443, "default-deny"),
    ]
    with pytest.raises(AccessDeniedError, match=r"egress: cdn\.example/a was refused: no rule"):
        one.endpoint("cdn.example", "a")


def test_the_policy_of_a_build_counts_as_well():
    allowed = Rule("own", Action.ALLOW, (HostTarget("reg.example"),), layer=Layer.BUILD)
    mine = Policy(posture=Posture.ALLOWLIST, rules=(allowed,), layer=Layer.BUILD)
    one = access(narrowed=mine)
    assert reason(one, "reg.example", PUBLIC) == ""
    assert "is protected" in reason(one, "reg.example", PRIVATE)
    assert "(rule default-deny:" in reason(one, "cdn.example")


def test_what_connectors_serve_is_not_reached_by_the_node_itself():
    rule = Rule("corp", Action.ALLOW, (HostTarget("office.example"),), via=CONNECTOR)
    one = access(rule)
    with pytest.raises(AccessDeniedError, match="through a connector"):
        one.endpoint("office.example", "app")
    assert "through a connector" in reason(one, "office.example", PRIVATE)
    assert "through a connector" in reason(one, "office.example", "203.0.113.9")
