"""--secret, --ssh and --allow mean what they mean to buildx."""

from __future__ import annotations

import pytest

from offload_client.build.secretoptions import (
    AgentOption,
    SecretOption,
    parse_agents,
    parse_entitlements,
    parse_secrets,
)
from offload_core.errors import InvalidValueError


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("id=a", SecretOption("a")),
        ("id=a,src=x", SecretOption("a", "x")),
        ("ID=a,Source=x", SecretOption("a", "x")),
        ("type=file,id=a,src=x", SecretOption("a", "x")),
        ("id=a,env=X", SecretOption("a", "", "X")),
        ("type=env,id=a,src=X", SecretOption("a", "", "X")),
        ("id=a,src=x,env=X", SecretOption("a", "x", "X")),
        ('id=a,"src=with,comma"', SecretOption("a", "with,comma")),
    ],
)
def test_secret_is_read_as_buildx_does(text, secret):
    assert parse_secrets([text]) == [secret]


def test_last_secret_of_an_id_counts_and_empty_values_do_not():
    assert parse_secrets(["id=a,src=x", "", "id=b", "id=a,env=Y"]) == [
        SecretOption("a", "", "Y"),
        SecretOption("b"),
    ]


@pytest.mark.parametrize("text", ["src=x", "id=", "id=a,b", "id=a,type=x", "id=a,mode=1"])
def test_secret_that_buildx_refuses_is_refused(text):
    with pytest.raises(InvalidValueError):
        parse_secrets([text])


def test_agents_are_read_as_buildx_does():
    assert parse_agents(["default", "a=x", "b=x,y", "", "=z", "a=w"]) == [
        AgentOption("default", ["z"]),
        AgentOption("a", ["w"]),
        AgentOption("b", ["x", "y"]),
    ]


def test_known_entitlements_are_kept_once():
    given = ["network.host", "device=a,alias=b", "device", "network.host", "security.insecure", ""]
    assert parse_entitlements(given) == [
        "network.host", "device=a,alias=b", "device", "security.insecure",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["net.host", "network.host=1", "device=a,x=1", "device=a,b", "device=a b"]
)
def test_unknown_entitlements_are_refused(text):
    with pytest.raises(InvalidValueError):
        parse_entitlements([text])
