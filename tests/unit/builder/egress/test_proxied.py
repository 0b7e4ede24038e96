from __future__ import annotations

import pytest

from offload_builder.egress.policy.differences import differences
from offload_builder.egress.policy.merging import merge
from offload_builder.egress.policy.model import Layer
from offload_builder.egress.policy.reading import read_text


def policy(text: str, layer: Layer = Layer.POOL):
    return read_text(text, file="f.toml", layer=layer).require()


POOL = policy('posture = "open"')


@pytest.mark.parametrize(("pool", "project", "result"), [
    ("", "", False), ("proxied = true", "", True), ("", "proxied = true", True),
    ("proxied = true", "proxied = false", True),
])  # fmt: skip
def test_a_project_can_turn_the_proxy_on_but_not_off(pool, project, result):
    merged = merge(policy(f'posture = "open"\n{pool}'), policy(project, Layer.PROJECT))
    assert merged.policy.proxied is result


def test_a_build_has_no_say_in_it():
    reading = read_text("proxied = true", file="f.toml", layer=Layer.BUILD)
    assert [str(item) for item in reading.findings] == [
        "f.toml:1: proxied has no place in the policy of a build; leave it out"
    ]


def test_turning_it_on_is_narrower():
    proxied = policy('posture = "open"\nproxied = true')
    (change,) = differences(POOL, proxied)
    assert (change.what, change.effect.value) == ("proxied", "narrower")
