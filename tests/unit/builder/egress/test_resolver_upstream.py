from __future__ import annotations

import os
from typing import TYPE_CHECKING

import dns.message
import dns.rcode
import pytest

from offload_builder.egress.resolver.upstreams import Server, Upstreams, parse_server
from offload_core.errors import ConfigError
from tests.fixtures.nameserver import NameServer, allowing, name_server, resolving

if TYPE_CHECKING:
    from pathlib import Path

GOOD = "good.example. 300 IN A 93.184.216.34"


async def outcome(*servers: NameServer) -> str:
    async with resolving(allowing("good.example"), *servers) as lab:
        answer = await lab.ask("good.example")
        if answer.rcode() != dns.rcode.NOERROR:
            return dns.rcode.to_text(answer.rcode())
        return answer.answer[0][0].to_text()


@pytest.mark.parametrize("behaviour", ["truncate", "lowercase", "formerr-edns"])
async def test_a_doubtful_answer_is_settled_by_tcp(behaviour: str) -> None:
    async with name_server(GOOD, behaviour=behaviour) as server:
        assert await outcome(server) == "93.184.216.34"
        assert server.by_tcp >= 1


async def test_a_forged_answer_is_passed_over() -> None:
    async with name_server(GOOD, behaviour="wrong-id") as server:
        assert await outcome(server) == "93.184.216.34"
        assert server.by_tcp == 0


@pytest.mark.parametrize("behaviour", ["silent", "servfail"])
async def test_the_next_server_is_asked(behaviour: str) -> None:
    async with name_server(behaviour=behaviour) as bad, name_server(GOOD) as good:
        assert await outcome(bad, good) == "93.184.216.34"


async def test_a_closed_port_is_noticed_at_once_and_the_name_fails() -> None:
    assert await outcome(NameServer(port=9)) == "SERVFAIL"


async def test_a_failure_is_not_asked_for_again_at_once() -> None:
    async with (
        name_server(behaviour="servfail") as server,
        resolving(allowing("good.example"), server) as lab,
    ):
        for _ in range(3):
            assert (await lab.ask("good.example")).rcode() == dns.rcode.SERVFAIL
        assert server.asked["good.example", "A"] == 2


async def test_letters_of_a_question_are_drawn() -> None:
    records = [f"n{number}-abcdefghij.example. 9 IN A 93.184.216.34" for number in range(8)]
    async with (
        name_server(*records) as server,
        resolving(allowing("*.example"), server) as lab,
    ):
        for number in range(8):
            await lab.ask(f"n{number}-abcdefghij.example")
        assert any(text != text.lower() for text in server.spellings)
        assert len({text[2:] for text in server.spellings}) > 4


def test_servers_are_read_from_resolv_conf_and_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("# x\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a\nnameserver no\n")
    upstreams = Upstreams((), file)
    assert upstreams.servers() == (Server("192.0.2.1"), Server("fe80::1%eth0"))
    file.write_text("nameserver 192.0.2.2\n")
    os.utime(file, ns=(1, 1))
    assert upstreams.servers()[0] == Server("192.0.2.1")
    upstreams._look_at = 0.0
    assert upstreams.servers() == (Server("192.0.2.2"),)
    file.unlink()
    upstreams._look_at = 0.0
    assert upstreams.servers() == (Server("192.0.2.2"),)


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("192.0.2.1", Server("192.0.2.1")),
        ("192.0.2.1:5353", Server("192.0.2.1", 5353)),
        ("2001:db8::1", Server("2001:db8::1")),
        ("[2001:db8::1]:54", Server("2001:db8::1", 54)),
        ("[2001:db8::1]", Server("2001:db8::1")),
    ],
)
def test_a_server_is_read(text: str, server: Server) -> None:
    assert parse_server(text) == server
    assert parse_server(str(server)) == server


@pytest.mark.parametrize("text", ["", "dns.example", "192.0.2.1:0", "192.0.2.1:x", "[::1]:70000"])
def test_what_is_no_server_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="DNS server"):
        parse_server(text)
