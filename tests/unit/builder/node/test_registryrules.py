"""Registries of the node's configuration are rules of every policy."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_builder.egress.policy.evaluate import evaluate
from offload_builder.egress.policy.model import Attempt, Policy, Posture
from offload_builder.node.registryrules import registry_rules

PRIVATE = ipaddress.ip_address("10.1.2.3")


def test_registries_and_their_mirrors_are_allowed_in_private_networks_too():
    settings = {
        "registry.example:5000": RegistrySettings(http=True),
        "docker.io": RegistrySettings(mirrors=("mirror.example/hub", "http://10.1.2.3:5001")),
        "plain.example": RegistrySettings(http=True),
    }
    rules = registry_rules(Path("registries.toml"), settings)
    policy = Policy(Posture.ALLOWLIST).with_rules(rules)

    def allowed(host: str | None, port: int) -> bool:
        return evaluate(policy, Attempt(host, PRIVATE, port)).allowed

    assert allowed("registry.example", 5000)
    assert allowed("registry-1.docker.io", 443)
    assert allowed("mirror.example", 443)
    assert allowed("plain.example", 80)
    assert allowed(None, 5001)
    assert not allowed("registry.example", 443)
    assert not allowed("other.example", 443)
    assert not allowed(None, 443)
    assert len({rule.id for rule in rules}) == len(rules)
