"""The ports that an engine says it has chosen."""

from __future__ import annotations

from typing import Any

import pytest

from offload_client.sessions.portspecs import FIRST_CHOSEN, MAX_CHOSEN, from_engine


def test_ports_that_an_engine_chooses_are_at_the_loopback_address() -> None:
    places = [{"HostIp": "0.0.0.0", "HostPort": "49153"}, {"HostIp": "::", "HostPort": "49153"}]
    found = from_engine({"80/tcp": places, "53/udp": None, "9/sctp": places})
    assert [(one.container_port, one.host_ip, one.port) for one in found] == [("80/tcp", "", 49153)]


@pytest.mark.parametrize(
    "ports",
    [
        None,
        "80/tcp",
        [{}],
        {"80/tcp": "8"},
        {"80/tcp": ["8"]},
        {"80/tcp": [{}]},
        {"80/tcp": [{"HostPort": "many"}]},
        {"80/tcp": [{"HostPort": "70000"}]},
        {"80/tcp": [{"HostPort": "\u0665\u0665\u0665\u0665\u0665"}]},
        {"x/tcp": [{"HostPort": "49153"}]},
        # What somebody may expect at a well-known port of this machine is no engine's choice.
        {"5432/tcp": [{"HostPort": "5432"}]},
    ],
)
def test_what_an_engine_does_not_choose_is_not_opened(ports: Any) -> None:
    assert from_engine(ports) == []


def test_an_engine_gets_no_more_than_some_ports() -> None:
    places = [{"HostPort": str(port)} for port in range(FIRST_CHOSEN, 60000)]
    assert len(from_engine({"80/tcp": places})) == MAX_CHOSEN
