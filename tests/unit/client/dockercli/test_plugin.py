"""What docker's CLI says to its plugin."""

from __future__ import annotations

import json

import pytest

from offload_client.dockercli.plugin import metadata, strip_docker_flags, wants_other_builder


def test_metadata_is_what_docker_asks_for():
    found = json.loads(metadata())
    assert found["SchemaVersion"] == "0.1.0"
    assert found["Vendor"]


@pytest.mark.parametrize(
    ("words", "rest", "environment"),
    [
        (["offload", "build", "."], ["offload", "build", "."], {}),
        (["-D", "--context", "x", "offload"], ["offload"], {"DOCKER_CONTEXT": "x"}),
        (["--host=tcp://h:1", "offload", "-H"], ["offload", "-H"], {"DOCKER_HOST": "tcp://h:1"}),
        (["-Htcp://h:1", "-c=y", "offload"], ["offload"],
         {"DOCKER_HOST": "tcp://h:1", "DOCKER_CONTEXT": "y"}),
        (["--config", "/c", "--tls", "-l", "debug", "offload"], ["offload"],
         {"DOCKER_CONFIG": "/c"}),
        (["--help"], ["--help"], {}),
    ],
)  # fmt: skip
def test_flags_of_docker_itself_become_variables(words, rest, environment):
    found: dict[str, str] = {}
    assert strip_docker_flags(words, found) == rest
    assert found == environment


@pytest.mark.parametrize(
    ("words", "environment", "wanted"),
    [
        (["."], {}, False),
        (["--builder", "x", "."], {}, True),
        (["--builder=x", "."], {}, True),
        (["--", "--builder"], {}, False),
        (["."], {"BUILDX_BUILDER": "x"}, True),
    ],
)
def test_named_builder_is_another_one(words, environment, wanted):
    assert wants_other_builder(words, environment) is wanted
