"""What docker engines of sessions are told of registries."""

from __future__ import annotations

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_builder.node.sessions.registryoptions import registry_options


def test_an_engine_reaches_the_nodes_registry_without_tls():
    assert registry_options({}) == {"insecure-registries": ["100.64.0.0/10"]}


def test_an_engine_knows_insecure_registries_and_mirrors_that_it_can_use():
    hub = RegistrySettings(mirrors=("mirror.example", "plain.example:80", "x.example/path"))
    settings = {
        "docker.io": hub,
        "plain.example:80": RegistrySettings(http=True),
        "odd.example": RegistrySettings(insecure=True),
    }
    assert registry_options(settings) == {
        "insecure-registries": ["100.64.0.0/10", "plain.example:80", "odd.example"],
        "registry-mirrors": ["https://mirror.example", "http://plain.example:80"],
    }
