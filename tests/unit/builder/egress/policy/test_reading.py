"""What the reader of policy files takes, and what it says with which line."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from offload_builder.egress.policy.model import Action, HostTarget, Layer, PortRange, Protocol
from offload_builder.egress.policy.presets import PRESETS
from offload_builder.egress.policy.reading import read_file, read_text
from offload_core.errors import ConfigError
from tests.unit.builder.egress.policy.texts import NOW, findings, read

RULE = 'posture = "allowlist"\n[[rule]]\nid = "a"\n'


def test_a_full_rule_is_read_with_its_line():
    policy = read(
        'pool = "eu-1"\nposture = "allowlist"\ncontact = "#net"\n\n[[rule]]\nid = "tools"\n'
        'allow = ["Tools.Example.com.", "*.cdn.example.com", "203.0.113.7", "2001:db8:1::/48"]\n'
        'ports = [443, "8000-8100", 8101]\ncomment = "why"\nowner = "anna"\nexpires = 2030-12-31\n'
    )
    (rule,) = policy.rules
    assert (rule.place.file, rule.place.line) == ("policy.toml", 5)
    assert rule.targets[:2] == (
        HostTarget("tools.example.com"),
        HostTarget("cdn.example.com", wildcard=True),
    )
    assert rule.ports == (PortRange(443, 443), PortRange(8000, 8101))
    assert (rule.protocol, rule.action) == (Protocol.TCP, Action.ALLOW)
    assert rule.expires == datetime(2031, 1, 1, tzinfo=UTC)
    assert (policy.name, policy.contact) == ("eu-1", "#net")


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 1, "needs a posture"),
        ('posture = "closed"', 1, 'no posture "closed"; take open or allowlist'),
        ("posture = ", 1, "not valid TOML"),
        ('posture = "open"\nx = "\n', 2, "not valid TOML"),
        ('posture = "open"\nruel = 1', 2, 'unknown key "ruel"'),
        ('posture = "open"\npresets = "pypi"', 2, "presets must be: list of texts"),
        ('posture = "open"\npresets = [\n  "pypi",\n  "nope",\n]', 4, 'no preset "nope"'),
        ('posture = "open"\nrule = 3', 2, "rule must be: tables"),
        ('posture = "open"\nrule = [3]', 2, "must be a table"),
        ('posture = "open"\ncontact = "a\\nb"', 2, "one line"),
        ('posture = "open"\nprojects_may_allow = "all"', 2, "nothing"),
        (RULE, 2, "either allow or deny"),
        (RULE + 'allow = ["a.example"]\ndeny = ["b.example"]', 2, "either allow or deny"),
        (RULE + "allow = []", 4, "empty"),
        (RULE + 'allow = ["a.example", 3]', 4, "a target is a text"),
        (RULE + 'allow = ["*"]', 4, "what the posture is for"),
        (RULE + 'allow = ["a.*.example"]', 4, 'only "*.domain"'),
        (RULE + 'allow = ["https://a.example/x"]', 4, 'needs proxied = true'),
        (RULE + 'allow = ["a.example/x"]', 4, "has a path"),
        (RULE + 'allow = ["a.example:443"]', 4, "under the key ports"),
        (RULE + 'allow = ["a..example"]', 4, "neither a host"),
        (RULE + 'allow = [\n "b.example",\n "10.0.0.1/8"]', 6, "write 10.0.0.0/8, or 10.0.0.1"),
        (RULE + 'allow = ["300.1.1.1"]', 4, "not an address"),
        (RULE + 'allow = ["127.0.0.1"]', 4, "never allowed"),
        (RULE + 'allow = ["::ffff:10.0.0.1"]', 4, "never allowed"),
        (RULE + 'allow = ["64:ff9b::a00:1"]', 4, "never allowed"),
        (RULE + 'allow = ["localhost"]', 4, "the step itself"),
        (RULE + 'allow = ["a.example"]\nports = [0]', 5, "not between 1 and 65535"),
        (RULE + 'allow = ["a.example"]\nports = ["9-8"]', 5, "ends before it begins"),
        (RULE + 'allow = ["a.example"]\nports = ["https"]', 5, "not a port"),
        (RULE + 'allow = ["a.example"]\nports = []', 5, "leave ports out"),
        (RULE + 'allow = ["a.example"]\nports = [true]', 5, "a port is a number"),
        (RULE + 'allow = ["a.example"]\nprotocol = "sctp"', 5, 'no protocol "sctp"'),
        (RULE + 'allow = ["a.example"]\nprotocol = "icmp"\nports = [1]', 6, "icmp has no ports"),
        (RULE + 'allow = ["8.8.8.8"]\nprivate = true', 5, "private is for hosts"),
        (RULE + 'deny = ["a.example"]\nports = [1]', 5, "denied as a whole"),
        (RULE + 'allow = ["a.example"]\nexpires = 2030-05-31', 5, "expired on 2030-05-31"),
        (RULE + 'allow = ["a.example"]\nexpires = 2031-01-01T00:00:00', 5, "needs its zone"),
        (RULE + 'allow = ["a.example"]\nexpires = "soon"', 5, "expires must be"),
        (RULE + 'allow = ["a.example"]\n' + RULE[22:] + 'allow = ["b.example"]', 6, "in line 2"),
        ('posture = "open"\n[[rule]]\nid = "A b"\nallow = ["10.1.1.1"]', 3, "cannot be the id"),
        ('posture = "open"\n[[rule]]\nid = "preset-x"\nallow = ["10.1.1.1"]', 3, "are ours"),
        ('posture = "open"\n[[rule]]\nallow = ["10.1.1.1"]', 2, "needs an id"),
        (
            RULE + 'allow = ["www.bad.example"]\n[[rule]]\nid = "b"\ndeny = ["*.bad.example"]',
            2, 'the rule "b" in line 5 denies all of it',
        ),
        (
            RULE + 'allow = ["10.1.0.0/16"]\nports = [443]\n[[rule]]\nid = "b"\n'
            'deny = ["10.0.0.0/8"]\nports = ["1-1000"]\nprotocol = "tcp"', 2, "can never allow",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_line(text, line, part):
    reading = read_text(text, file="p", now=NOW)
    serious = [item for item in reading.findings if item.serious]
    assert reading.policy is None
    assert [item.place.line for item in serious if part in item.sentence] == [line], serious


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('posture = "open"\n[[rule]]\nid = "a"\nallow = ["a.example"]', "changes nothing"),
        (RULE + 'allow = ["0.0.0.0/0"]', "does not open the protected ranges"),
        (RULE + 'allow = ["*.com"]', "top-level domain"),
        (RULE + 'allow = ["a.example"]\nexpires = 2030-06-03', "ends 2030-06-03"),
        (RULE + 'allow = ["a.example", "a.example"]', "twice"),
        (
            RULE + 'allow = ["*.b.example"]\n[[rule]]\nid = "b"\nallow = ["a.b.example"]',
            'adds nothing to the rule "a"',
        ),
        (
            'posture = "allowlist"\npresets = ["pypi"]\n[[rule]]\nid = "b"\ndeny = ["pypi.org"]',
            'the preset "pypi" cannot allow pypi.org',
        ),
    ],
)
def test_what_looks_odd_is_a_warning_only(text, part):
    found = findings(text)
    assert len(found) == 1, found
    assert "warning: " in found[0]
    assert part in found[0]
    read(text)


def test_all_findings_of_a_file_are_told_at_once():
    found = findings(RULE + 'allow = ["a b"]\nports = [0]\nbogus = 1\n')
    assert len(found) == 3


def test_names_are_taken_in_any_alphabet():
    (rule,) = read(RULE + 'allow = ["Bücher.example"]').rules
    assert str(rule.targets[0]) == "xn--bcher-kva.example"


def test_a_project_may_not_set_what_is_the_pools():
    (found,) = findings('projects_may_allow = "public"', Layer.PROJECT)
    assert "has no place in the policy of a project" in found
    (found,) = findings('posture = "open"', Layer.PROJECT)
    assert "can only tighten" in found
    assert findings("", Layer.PROJECT) == []


def test_a_stored_policy_keeps_rules_that_have_expired_since():
    text = RULE + 'allow = ["a.example"]\nexpires = 2030-01-01'
    policy = read_text(text, file="p", version=3, now=NOW).require()
    assert policy.rules
    assert not policy.rules_at(NOW)


def test_every_preset_is_valid():
    names = ", ".join(f'"{name}"' for name in PRESETS)
    policy = read(f'posture = "allowlist"\npresets = [{names}]')
    assert {rule.preset for rule in policy.rules} == set(PRESETS)
    assert len({rule.id for rule in policy.rules}) == len(policy.rules)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the policy"):
        read_file(tmp_path / "none.toml")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_file(tmp_path / "bad")
