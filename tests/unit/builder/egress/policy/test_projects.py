"""What a project hears about rules of its own that cannot count."""

from __future__ import annotations

from offload_builder.egress.policy.merging import merge
from offload_builder.egress.policy.model import Layer
from tests.unit.builder.egress.policy.texts import judged, read


def test_a_project_hears_that_the_pool_denies_what_it_allows():
    pool = read(
        'posture = "allowlist"\nprojects_may_allow = "public"\n'
        '[[rule]]\nid = "no"\ndeny = ["*.bad.example"]\nowner = "anna"\n'
    )
    own = read('[[rule]]\nid = "a"\nallow = ["x.bad.example", "y.example"]', Layer.PROJECT)
    merged = merge(pool, own)
    (finding,) = merged.refused
    assert finding.sentence == (
        'the rule "a" cannot allow x.bad.example, because the pool denies it with its rule "no"; '
        "ask anna"
    )
    assert judged(merged.policy, "y.example").allowed
