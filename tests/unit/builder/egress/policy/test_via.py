"""Names that are reached through a connector: how they are read, judged and compared."""

from __future__ import annotations

import pytest

from offload_builder.egress.policy.contradictions import opens
from offload_builder.egress.policy.differences import differences
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.explain import explain, rule_toml
from offload_builder.egress.policy.kubernetes import export
from offload_builder.egress.policy.merging import merge
from offload_builder.egress.policy.model import Layer, Protocol
from tests.unit.builder.egress.policy.texts import NOW, attempt, findings, judged, read

HEAD = 'posture = "open"\n'
ALLOWLIST = 'posture = "allowlist"\n'
RULE = '[[rule]]\nid = "office"\nallow = ["a.corp.example"]\nports = [443]\nvia = "connector"\n'


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ('allow = ["a.example"]\nvia = "vpn"', 'no way "vpn"'),
        ('allow = ["*.a.example"]\nvia = "connector"', "by their whole names"),
        ('allow = ["10.0.0.1"]\nvia = "connector"', "by their whole names"),
        ('deny = ["a.example"]\nvia = "connector"', "by their whole names"),
        ('allow = ["a.example"]\nvia = "connector"\nprotocol = "udp"', "tcp only"),
        ('allow = ["a.example"]\nvia = "connector"\nprivate = true', "private is for"),
        ('allow = ["a.example"]\nvia = 3', "via must be"),
    ],
)
def test_a_way_that_makes_no_sense_is_a_mistake_with_its_line(lines, part):
    (found,) = [item for item in findings(f'{HEAD}[[rule]]\nid = "a"\n{lines}') if part in item]
    assert "warning" not in found


def test_neither_posture_nor_other_rules_count_for_such_a_name():
    policy = read(
        f'{HEAD}{RULE}[[rule]]\nid = "other"\nallow = ["*.corp.example"]\nprivate = true\n'
    )
    assert judged(policy, "a.corp.example").allowed
    refused = judged(policy, "a.corp.example", port=80)
    assert (refused.allowed, refused.rule_id) == (False, "office")
    assert "no rule for that allows a.corp.example:80" in refused.reason
    assert not judged(policy, "a.corp.example", protocol=Protocol.UDP).allowed
    assert judged(policy, "b.corp.example", port=80).allowed
    evaluator = Evaluator(policy)
    assert evaluator.connected("A.corp.example.", NOW)
    assert not evaluator.connected("b.corp.example", NOW)
    assert evaluator.admissions("a.corp.example", NOW) == ()


def test_a_deny_rule_and_an_end_count_here_too():
    two = RULE.replace('["a.corp.example"]', '["a.corp.example", "b.corp.example"]')
    denied = read(f'{HEAD}{two}[[rule]]\nid = "no"\ndeny = ["a.corp.example"]\n')
    assert judged(denied, "a.corp.example").rule_id == "no"
    assert judged(denied, "b.corp.example").allowed
    ended = read(f"{HEAD}{RULE}expires = 2030-06-02\n")
    assert Evaluator(ended).connected("a.corp.example", NOW)
    assert not Evaluator(ended).connected("a.corp.example", NOW.replace(day=4))


def test_a_project_needs_the_word_of_its_pool():
    project = read(RULE, Layer.PROJECT)
    assert merge(read('posture = "open"\nprojects_may_allow = "public"\n'), project).refused
    pool = read('posture = "allowlist"\nprojects_may_allow = ["*.corp.example"]\n')
    assert Evaluator(merge(pool, project).policy).connected("a.corp.example", NOW)
    assert any("no place" in item for item in findings(RULE, Layer.BUILD))


def test_people_see_the_way():
    policy = read(HEAD + RULE)
    (rule,) = policy.rules
    assert opens(rule)
    assert "via connector" in str(rule)
    assert 'via = "connector"' in rule_toml(rule)
    plain = read(HEAD + RULE.replace('via = "connector"\n', "private = true\n"))
    (change,) = differences(plain, policy)
    assert change.effect.value == "wider and narrower"
    told = explain(policy, attempt("a.corp.example"), now=NOW)
    assert any("offload connect --list" in note for note in told.notes)
    assert "reached through a connector only" in str(export(read(ALLOWLIST + RULE)))
