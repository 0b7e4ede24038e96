"""Policies that builds bring: which are the same, and what of them is refused."""

from __future__ import annotations

import pytest

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.merging import narrow
from offload_builder.egress.policy.model import Layer, Posture
from offload_builder.egress.policy.ofbuild import MAX_BYTES, read_build_policy
from offload_builder.egress.policy.reading import read_text
from offload_core.errors import ConfigError, UsageError
from offload_proto.v1.builds_service_pb2 import NetworkPolicy

RULE = '[[rule]]\nid = "a"\nallow = ["a.example"]\n'
POOL = 'posture = "{}"\n[[rule]]\nid = "p"\nallow = ["*.example"]\nports = ["80-90", 443]\n'


def of(text: str, file: str = "build.toml", **options):
    return read_build_policy(NetworkPolicy(file=file, text=text), **options)


def test_texts_that_say_the_same_in_the_same_lines_have_one_key():
    same = (RULE, RULE.replace("\n", "\r\n"), RULE.replace("\n", "  \n"), f"{RULE}\n\n")
    assert len({of(text).key for text in same}) == 1
    others = (of(f"\n{RULE}"), of(RULE, "other.toml"), of(RULE.replace("a.ex", "b.ex")), of(""))
    assert len({item.key for item in (of(RULE), *others)}) == 5
    assert of(RULE) == of(f"{RULE}\n")


def test_without_a_text_nothing_is_reached():
    policy = of("", "--network-policy none").policy
    assert (policy.posture, policy.rules) == (Posture.ALLOWLIST, ())
    assert policy.layer is Layer.BUILD


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[rule]", "build.toml:1: this is not valid TOML"),
        (RULE.replace("a.example", "10.1.2.3/8"), "build.toml:3: "),
        ("proxied = true\n", "build.toml:1: proxied has no place in the policy of a build"),
        ("#" * (MAX_BYTES + 1), "build.toml is larger than 64 KiB"),
    ],
)
def test_a_file_with_a_mistake_is_told_with_its_line(text: str, problem: str):
    with pytest.raises(ConfigError, match="^" + problem.replace("[", r"\[")):
        of(text)


@pytest.mark.parametrize("file", ["", "a" * 201, "a\nb", "\x1b[2J"])
def test_names_of_files_are_shown_to_people(file: str):
    with pytest.raises(UsageError, match="a file name of at most 200 characters"):
        of(RULE, file)


def test_a_rule_may_expire_while_its_build_waits():
    text = f"{RULE}expires = 2020-01-01\n"
    with pytest.raises(ConfigError, match="expired"):
        of(text)
    assert of(text, admitted=True).policy.rules_at() == ()


@pytest.mark.parametrize(
    ("posture", "own", "expected"),
    [
        ("allowlist", 'allow = ["a.example"]\nports = [443, 8080]', {("tcp", "443")}),
        ("allowlist", 'allow = ["a.example"]\nports = ["85-100"]', {("tcp", "85-90")}),
        ("allowlist", 'allow = ["*.example"]', {("tcp", "80-90"), ("tcp", "443")}),
        ("allowlist", 'allow = ["a.example"]\nports = [22]', set()),
        ("allowlist", 'allow = ["a.example"]\nprotocol = "udp"', set()),
        ("open", 'allow = ["a.example"]\nports = [22]', {("tcp", "22")}),
        ("open", 'allow = ["a.example"]\nprotocol = "icmp"', {("icmp", "")}),
        ("open", 'deny = ["b.example"]', set()),
    ],
)
def test_addresses_of_a_name_are_reached_where_both_policies_say_so(posture, own, expected):
    base = read_text(POOL.format(posture), file="pool.toml").require()
    policy = narrow(base, of(f'[[rule]]\nid = "o"\n{own}\n').policy)
    found = Evaluator(policy).admissions("a.example")
    parts = {(one.protocol.value, str(part)) for one in found for part in one.ports or ("",)}
    assert parts == expected
    # Addresses that any of the policies lists have to be known to the firewall.
    assert all(one.rule is not None for one in found)


def test_where_both_postures_are_open_no_address_has_to_be_listed():
    base = read_text('posture = "open"\n', file="pool.toml").require()
    own = of('posture = "open"\n[[rule]]\nid = "o"\ndeny = ["b.example"]\n').policy
    (found,) = Evaluator(narrow(base, own)).admissions("a.example")
    assert found.rule is None
    assert Evaluator(narrow(base, own)).admissions("b.example") == ()
