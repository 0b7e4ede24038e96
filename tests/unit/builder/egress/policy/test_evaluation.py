"""Which attempts a policy allows, by which rule, and what it says about it."""

from __future__ import annotations

import ipaddress
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.policy.evaluate import Evaluator, evaluate
from offload_builder.egress.policy.explain import explain
from offload_builder.egress.policy.merging import NO_NETWORK, merge, narrow
from offload_builder.egress.policy.model import (
    DEFAULT_POLICY,
    PROTECTED,
    Action,
    Attempt,
    HostTarget,
    Layer,
    NetworkTarget,
    Opening,
    Place,
    Policy,
    PortRange,
    Posture,
    ProtectedRange,
    Protocol,
    Rule,
    opened_networks,
)
from tests.unit.builder.egress.policy.texts import NOW, attempt, judged, read

LIST = read(
    """
pool = "eu-1"
posture = "allowlist"
contact = "#net"
presets = ["pypi"]

[[rule]]
id = "cdn"
allow = ["*.cdn.example", "203.0.113.0/24"]
ports = [443]

[[rule]]
id = "bad"
deny = ["bad.cdn.example", "203.0.113.66"]
comment = "hacked"

[[rule]]
id = "db"
allow = ["10.1.2.3"]
ports = [5432]

[[rule]]
id = "corp"
allow = ["*.corp.example"]
private = true

[[rule]]
id = "old"
allow = ["old.example"]
expires = 2030-12-31
"""
)
OPEN = read('posture = "open"\n[[rule]]\nid = "bad"\ndeny = ["*.evil.example", "198.51.100.0/24"]')


@pytest.mark.parametrize(
    ("policy", "target", "rule_id"),
    [
        (LIST, ("pypi.org", "151.101.0.223"), "+preset-pypi"),
        (LIST, ("PyPI.org.", None), "+preset-pypi"),
        (LIST, ("pypi.org", None, 22), "default-deny"),
        (LIST, ("x.pypi.org", None), "default-deny"),
        (LIST, ("a.b.cdn.example", None), "+cdn"),
        (LIST, ("cdn.example", None), "default-deny"),
        (LIST, ("xcdn.example", None), "default-deny"),
        (LIST, ("bad.cdn.example", None), "bad"),
        (LIST, ("a.cdn.example", "203.0.113.66"), "bad"),
        (LIST, (None, "203.0.113.9"), "+cdn"),
        (LIST, (None, "203.0.113.9", 80), "default-deny"),
        (LIST, ("evil.example", "203.0.113.9"), "+cdn"),
        (LIST, (None, "10.1.2.3", 5432), "+db"),
        (LIST, (None, "10.1.2.3", 443), "protected-private"),
        (LIST, (None, "10.1.2.4", 5432), "protected-private"),
        (LIST, ("a.cdn.example", "10.0.0.1"), "protected-private"),
        (LIST, ("a.cdn.example", "169.254.169.254"), "protected-metadata"),
        (LIST, ("git.corp.example", "10.0.0.1"), "+corp"),
        (LIST, ("git.corp.example", "fd00::1"), "+corp"),
        (LIST, ("git.corp.example", "100.64.0.1"), "+corp"),
        (LIST, ("git.corp.example", "169.254.169.254"), "protected-metadata"),
        (LIST, ("git.corp.example", "100.100.100.200"), "protected-metadata"),
        (LIST, ("git.corp.example", "127.0.0.1"), "protected-loopback"),
        (LIST, ("git.corp.example", "::ffff:10.0.0.1"), "protected-v4-mapped"),
        (LIST, ("git.corp.example", "fe80::1"), "protected-link-local"),
        (LIST, ("old.example", None), "+old"),
        (OPEN, ("any.example", "192.0.2.1"), "+default-allow"),
        (OPEN, (None, "192.0.2.1", 25), "+default-allow"),
        (OPEN, ("x.evil.example", None), "bad"),
        (OPEN, (None, "198.51.100.3"), "bad"),
        (OPEN, (None, "169.254.169.254", 80), "protected-metadata"),
        (OPEN, (None, "192.168.0.1"), "protected-private"),
        (OPEN, (None, "fd00:ec2::254"), "protected-metadata"),
        (OPEN, (None, "2002:a00:1::"), "protected-6to4"),
        (OPEN, (None, "64:ff9b::a9fe:a9fe"), "protected-nat64"),
        (OPEN, (None, "0.0.0.0"), "protected-reserved"),
        (OPEN, (None, "255.255.255.255"), "protected-reserved"),
        (OPEN, (None, "ff02::1"), "protected-multicast"),
    ],
)
def test_verdicts(policy, target, rule_id):
    verdict = judged(policy, *target)
    assert ("+" if verdict.allowed else "") + verdict.rule_id == rule_id, verdict


def test_a_verdict_names_file_line_and_reason():
    verdict = judged(LIST, "bad.cdn.example")
    assert str(verdict.place) == "policy.toml:12"
    assert verdict.reason == 'the rule "bad" denies bad.cdn.example:443 (hacked)'
    assert verdict.rule_text == "deny bad.cdn.example, 203.0.113.66"
    assert judged(LIST, "x.example").reason == "no rule of pool eu-1 allows x.example:443"


def test_a_rule_that_ends_counts_no_longer():
    later = NOW + timedelta(days=300)
    assert evaluate(LIST, attempt("old.example"), now=later).rule_id == "default-deny"
    told = explain(LIST, attempt("old.example"), now=later)
    assert told.notes == ('the rule "old" allowed it until 2030-12-31 (policy.toml:27)',)


def test_addresses_of_the_service_itself_cannot_be_opened():
    policy = read('posture = "open"\n[[rule]]\nid = "own"\nallow = ["10.9.0.0/16"]')
    own = ProtectedRange("gateway", ipaddress.ip_network("10.9.0.1/32"), "the gateway", False)
    assert judged(policy, None, "10.9.0.1").allowed
    assert not evaluate(policy, attempt(None, "10.9.0.1"), now=NOW, guarded=(own,)).allowed


def test_a_wide_private_range_does_not_open_the_metadata_service_in_it():
    policy = read('posture = "allowlist"\n[[rule]]\nid = "own"\nallow = ["100.64.0.0/10"]')
    assert judged(policy, None, "100.64.0.1").allowed
    assert judged(policy, None, "100.100.100.200").rule_id == "protected-metadata"
    opened = opened_networks(ipaddress.ip_network("100.64.0.0/10"))
    assert not any(ipaddress.ip_address("100.100.100.200") in item for item in opened)
    assert sum(item.num_addresses for item in opened) == (1 << 22) - 1


def test_names_are_looked_up_when_a_rule_allows_them():
    ready = Evaluator(LIST)
    assert ready.name("a.cdn.example", NOW).allowed
    assert ready.name("bad.cdn.example", NOW).rule_id == "bad"
    assert ready.name("tunnel.evil.example", NOW).rule_id == "default-deny"
    (found,) = ready.admissions("a.cdn.example", NOW)
    assert (found.protocol, found.ports) == (Protocol.TCP, (PortRange(443, 443),))
    assert ready.admissions("bad.cdn.example", NOW) == ()
    assert Evaluator(OPEN).admissions("any.example", NOW)[0].rule is None


def test_an_explanation_says_what_nearly_matches_and_whom_to_ask():
    told = explain(LIST, attempt("pypi.org", port=8443), now=NOW)
    assert told.notes == ('the rule "preset-pypi" allows 443 (tcp) only (policy.toml:5)',)
    assert told.ask == "ask #net for pypi.org:8443, with the rule below"
    assert read(f'posture = "allowlist"\n{told.proposal}').rules[0].hosts
    told = explain(LIST, attempt("bad.cdn.example"), now=NOW)
    assert told.ask == 'ask #net, who owns the rule "bad" in policy.toml:12'
    assert told.proposal == ""
    told = explain(LIST, attempt(None, "127.0.0.1"), now=NOW)
    assert told.ask == "no rule can allow this address"


def project(text: str) -> Policy:
    return read(text, Layer.PROJECT)


def pool(may_allow: str) -> Policy:
    return read(f'posture = "allowlist"\nprojects_may_allow = {may_allow}\n')


PUBLIC = '[[rule]]\nid = "p"\nallow = ["p.example"]'
PRIVATE = '[[rule]]\nid = "p"\nallow = ["10.1.2.3"]'
PRIVATE_NAME = '[[rule]]\nid = "p"\nallow = ["p.corp.example"]\nprivate = true'


@pytest.mark.parametrize(
    ("may_allow", "text", "allowed"),
    [
        ('"nothing"', PUBLIC, False),
        ('"public"', PUBLIC, True),
        ('"public"', PRIVATE, False),
        ('"public"', PRIVATE_NAME, False),
        ('["*.example"]', PUBLIC, True),
        ('["*.corp.example"]', PUBLIC, False),
        ('["*.corp.example"]', PRIVATE_NAME, True),
        ('["10.1.0.0/16"]', PRIVATE, True),
        ('["10.2.0.0/16"]', PRIVATE, False),
        ('"nothing"', 'presets = ["pypi"]', False),
        ('"public"', 'presets = ["pypi"]', True),
    ],
)
def test_a_project_allows_what_its_pool_lets_it(may_allow, text, allowed):
    merged = merge(pool(may_allow), project(text))
    assert bool(merged.policy.rules) is allowed
    assert bool(merged.refused) is not allowed
    if merged.refused:
        assert merged.refused[0].place.line >= 1
        assert "ask an administrator" in merged.refused[0].sentence


def test_a_project_may_deny_and_tighten_always():
    base = read('posture = "open"\n')
    merged = merge(base, project('posture = "allowlist"\npresets = ["pypi"]\n'))
    assert merged.policy.posture is Posture.ALLOWLIST
    assert judged(merged.policy, "pypi.org").allowed
    assert not judged(merged.policy, "npm.example").allowed
    denied = merge(base, project('[[rule]]\nid = "n"\ndeny = ["npm.example"]'))
    assert judged(denied.policy, "npm.example").layer is Layer.PROJECT


def test_a_rule_of_a_project_gets_another_id_where_the_pool_has_it():
    base = read('posture = "allowlist"\nprojects_may_allow = "public"\n' + PUBLIC)
    merged = merge(base, project(PUBLIC.replace("p.example", "q.example")))
    assert [rule.id for rule in merged.policy.rules] == ["p", "project-p"]


def test_a_build_without_network_reaches_nothing():
    verdict = judged(narrow(DEFAULT_POLICY, NO_NETWORK), "pypi.org", "151.101.0.223")
    assert not verdict.allowed
    assert verdict.layer is Layer.BUILD
    assert str(verdict.place) == "--network-policy none"


# --- Properties.

NAMES = ["a.example", "b.a.example", "c.b.a.example", "d.example", "example"]
ADDRESSES = ["203.0.113.5", "10.1.2.3", "169.254.169.254", "100.64.0.9", "127.0.0.1", "fd00::1",
             "2001:db9::1", "::ffff:1.2.3.4", "192.0.2.200"]  # fmt: skip
targets = st.one_of(
    st.builds(HostTarget, st.sampled_from(NAMES), st.booleans()),
    st.sampled_from(ADDRESSES).map(lambda text: NetworkTarget(ipaddress.ip_network(text))),
    st.sampled_from(["10.0.0.0/8", "0.0.0.0/0", "192.0.2.0/24", "fc00::/7", "::/0"]).map(
        lambda text: NetworkTarget(ipaddress.ip_network(text))
    ),
)
ports = st.lists(
    st.sampled_from([(443, 443), (80, 90), (1, 65535)]).map(lambda pair: PortRange(*pair)),
    max_size=2,
).map(tuple)
rules = st.builds(
    Rule,
    id=st.uuids().map(str),
    action=st.sampled_from(Action),
    targets=st.lists(targets, min_size=1, max_size=3).map(tuple),
    ports=ports,
    protocol=st.sampled_from(Protocol),
    private=st.booleans(),
    place=st.integers(1, 99).map(lambda line: Place("p", line)),
)
openings = st.builds(
    Opening, public=st.booleans(), targets=st.lists(targets, max_size=2).map(tuple)
)
policies = st.builds(
    Policy,
    posture=st.sampled_from(Posture),
    rules=st.lists(rules, max_size=5).map(tuple),
    may_allow=openings,
)
attempts = st.builds(
    Attempt,
    host=st.none() | st.sampled_from(NAMES),
    address=st.sampled_from(ADDRESSES).map(ipaddress.ip_address),
    port=st.sampled_from([None, 22, 85, 443]),
    protocol=st.sampled_from(Protocol),
)


@given(policies, policies, attempts)
def test_a_build_never_widens(base, build, what):
    if evaluate(narrow(base, build), what, now=NOW).allowed:
        assert evaluate(base, what, now=NOW).allowed
        assert evaluate(build, what, now=NOW, guarded=()).allowed or any(
            what.address in item.network for item in PROTECTED
        )


@given(policies, policies, attempts)
def test_a_project_widens_only_as_far_as_its_pool_lets_it(base, own, what):
    merged = merge(base, own).policy
    if evaluate(merged, what, now=NOW).allowed and not evaluate(base, what, now=NOW).allowed:
        opening = base.may_allow
        protected = any(what.address in item.network for item in PROTECTED)
        named = any(
            target.matches(what.host) if isinstance(target, HostTarget) and what.host
            else isinstance(target, NetworkTarget) and target.matches(what.address)
            for target in opening.targets
        )  # fmt: skip
        assert named or (opening.public and not protected)


@given(policies, rules, attempts)
def test_a_further_deny_never_widens(base, rule, what):
    more = base.with_rules((Rule(**{**vars(rule), "action": Action.DENY}),))
    if evaluate(more, what, now=NOW).allowed:
        assert evaluate(base, what, now=NOW).allowed


@given(policies, attempts)
def test_the_order_of_rules_does_not_matter(base, what):
    turned = Policy(posture=base.posture, rules=base.rules[::-1])
    assert evaluate(base, what, now=NOW).allowed == evaluate(turned, what, now=NOW).allowed


@given(policies, attempts)
def test_what_can_never_be_opened_is_never_allowed(base, what):
    closed = [item for item in PROTECTED if not item.openable and what.address in item.network]
    if closed:
        assert not evaluate(base, what, now=NOW).allowed


@given(policies, attempts)
def test_what_is_allowed_is_found_by_a_plain_search(base, what):
    """Compare the tables with a search through all rules."""
    meant = [
        rule for rule in base.rules
        if rule.speaks(what.protocol, what.port)
        and (
            any(host.matches(what.host or "") for host in rule.hosts)
            or any(what.address in network for network in rule.networks)
        )
    ]  # fmt: skip
    verdict = evaluate(base, what, now=NOW)
    if any(rule.action is Action.DENY for rule in meant):
        assert not verdict.allowed
    elif not any(what.address in item.network for item in PROTECTED):
        assert verdict.allowed == (bool(meant) or base.posture is Posture.OPEN)
