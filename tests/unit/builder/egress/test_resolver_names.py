from __future__ import annotations

import asyncio
from dataclasses import replace

import dns.flags
import dns.message
import dns.rcode
import pytest

from offload_builder.egress.policy.model import (
    Action,
    EffectivePolicy,
    HostTarget,
    NetworkTarget,
    Policy,
    PortRange,
    Posture,
    Protocol,
    Rule,
)
from offload_builder.egress.resolver.contract import Grant, ServiceName
from offload_builder.egress.resolver.projectview import ViewLimits
from offload_core.errors import InternalError
from tests.fixtures.nameserver import Resolving, allowing, name_server, resolving

GOOD = "good.example. 300 IN A 93.184.216.34"


def addresses(answer: dns.message.Message) -> list[str]:
    found = []
    for rrset in answer.answer:
        found += [rdata.address for rdata in rrset if hasattr(rdata, "address")]
    return found


async def test_an_allowed_name_is_admitted_before_it_is_answered() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        lab.recorder.delay = 0.05
        answer = await lab.ask("good.example")
        [(project, admission)] = lab.recorder.admitted
        assert addresses(answer) == ["93.184.216.34"]
        assert (project, str(admission.address)) == ("shop", "93.184.216.34")
        assert admission.grant == Grant(Protocol.TCP, PortRange(443, 443), private=False)
        assert admission.seconds == 60 + 30
        assert answer.answer[0].ttl == 60
        [heard] = lab.recorder.answers
        assert (heard.name, heard.rule_id, heard.source) == ("good.example", "test", "127.0.0.1")


async def test_a_name_that_is_not_allowed_is_refused_told_and_never_passed_on() -> None:
    async with name_server(GOOD) as server, resolving(allowing("other.example"), server) as lab:
        answer = await lab.ask("data.good.example")
        assert answer.rcode() == dns.rcode.REFUSED
        assert not server.asked
        [refusal] = lab.recorder.refusals
        assert (refusal.project, refusal.source) == ("shop", "127.0.0.1")
        assert (refusal.name, refusal.qtype) == ("data.good.example", "A")
        assert refusal.rule_id == "default-deny"
        assert "data.good.example" in refusal.reason
        assert refusal.reason in answer.options[0].to_text()


async def test_spelling_and_a_dot_at_the_end_do_not_matter() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        answer = await lab.ask("GOOD.ExamplE.")
        assert addresses(answer) == ["93.184.216.34"]
        assert answer.question[0].name.to_text() == "GOOD.ExamplE."


async def test_a_wildcard_is_for_names_below_its_domain_only() -> None:
    records = [GOOD, "a.b.good.example. 9 IN A 93.184.216.35"]
    async with (
        name_server(*records) as server,
        resolving(allowing("*.good.example"), server) as lab,
    ):
        assert (await lab.ask("good.example")).rcode() == dns.rcode.REFUSED
        assert (await lab.ask("evilgood.example")).rcode() == dns.rcode.REFUSED
        assert addresses(await lab.ask("a.b.good.example")) == ["93.184.216.35"]


async def test_a_deny_rule_wins_over_a_wildcard() -> None:
    policy = allowing("*.good.example")
    deny = Rule("no", Action.DENY, (HostTarget("bad.good.example"),), comment="known bad")
    policy = replace(policy, base=policy.base.with_rules((deny,)))
    async with name_server() as server, resolving(policy, server) as lab:
        answer = await lab.ask("bad.good.example")
        assert answer.rcode() == dns.rcode.REFUSED
        assert lab.recorder.refusals[0].rule_id == "no"
        assert not server.asked


@pytest.mark.parametrize("behaviour", ["", "one-link"])
async def test_the_asked_name_decides_about_its_whole_chain(behaviour: str) -> None:
    records = [
        "good.example. 300 IN CNAME edge.cdn.example.",
        "edge.cdn.example. 7 IN CNAME x.cdn.example.",
        "x.cdn.example. 300 IN A 93.184.216.40",
    ]
    async with (
        name_server(*records, behaviour=behaviour) as server,
        resolving(allowing("good.example"), server) as lab,
    ):
        answer = await lab.ask("good.example")
        assert addresses(answer) == ["93.184.216.40"]
        assert [str(rrset.name) for rrset in answer.answer] == [
            "good.example.",
            "edge.cdn.example.",
            "x.cdn.example.",
        ]
        assert {rrset.ttl for rrset in answer.answer} == {7}
        assert (await lab.ask("x.cdn.example")).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize("behaviour", ["", "one-link"])
async def test_a_chain_without_an_end_fails(behaviour: str) -> None:
    records = ["good.example. 9 IN CNAME b.example.", "b.example. 9 IN CNAME good.example."]
    async with (
        name_server(*records, behaviour=behaviour) as server,
        resolving(allowing("good.example"), server) as lab,
    ):
        answer = await lab.ask("good.example")
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert sum(server.asked.values()) < 30


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        ("A", "169.254.169.254"),
        ("A", "10.1.2.3"),
        ("A", "127.0.0.1"),
        ("A", "100.64.0.9"),
        ("A", "0.0.0.0"),
        ("AAAA", "::1"),
        ("AAAA", "fe80::1"),
        ("AAAA", "fd00::7"),
        ("AAAA", "::ffff:10.1.2.3"),
        ("AAAA", "64:ff9b::a01:203"),
    ],
)
async def test_an_allowed_name_cannot_lead_into_a_protected_range(kind: str, address: str) -> None:
    record = f"good.example. 1 IN {kind} {address}"
    async with name_server(record) as server, resolving(allowing("good.example"), server) as lab:
        answer = await lab.ask("good.example", kind)
        assert answer.rcode() == dns.rcode.NOERROR
        assert not answer.answer
        assert not lab.recorder.admitted
        [refusal] = lab.recorder.refusals
        assert refusal.rule_id.startswith("protected-")
        assert len(refusal.addresses) == 1
        assert lab.metric("offload_dns_stripped_addresses_total") == 1


async def test_public_addresses_beside_a_protected_one_are_kept() -> None:
    records = [GOOD, "good.example. 300 IN A 10.0.0.1"]
    async with name_server(*records) as server, resolving(allowing("good.example"), server) as lab:
        assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]
        assert lab.recorder.addresses == ["93.184.216.34"]


async def test_a_private_rule_opens_private_ranges_and_no_others() -> None:
    records = [
        "registry.corp. 60 IN A 10.0.0.1",
        "registry.corp. 60 IN A 127.0.0.1",
        "registry.corp. 60 IN A 169.254.169.254",
    ]
    policy = allowing("registry.corp", private=True)
    async with name_server(*records) as server, resolving(policy, server) as lab:
        assert addresses(await lab.ask("registry.corp")) == ["10.0.0.1"]
        [(_, admission)] = lab.recorder.admitted
        assert admission.protected
        assert admission.grant.private


async def test_an_address_that_a_rule_names_by_network_is_kept_without_an_entry() -> None:
    import ipaddress

    policy = allowing("git.corp")
    network = Rule("net", Action.ALLOW, (NetworkTarget(ipaddress.ip_network("10.0.0.0/24")),))
    policy = replace(policy, base=policy.base.with_rules((network,)))
    async with (
        name_server("git.corp. 60 IN A 10.0.0.5") as server,
        resolving(policy, server) as lab,
    ):
        assert addresses(await lab.ask("git.corp")) == ["10.0.0.5"]
        assert not lab.recorder.admitted


async def test_a_registry_of_the_configuration_is_allowed_without_a_rule() -> None:
    service = ServiceName("registry.corp", (5000,))
    async with (
        name_server("registry.corp. 60 IN A 10.0.0.1") as server,
        resolving(allowing(), server, services=[service]) as lab,
    ):
        assert addresses(await lab.ask("registry.corp")) == ["10.0.0.1"]
        [(_, admission)] = lab.recorder.admitted
        assert admission.grant.ports == PortRange(5000, 5000)
        assert admission.protected


async def test_an_open_posture_answers_all_names_and_needs_no_entries() -> None:
    policy = EffectivePolicy(Policy(Posture.OPEN))
    records = [GOOD, "evil.example. 9 IN A 10.0.0.1"]
    async with name_server(*records) as server, resolving(policy, server) as lab:
        assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]
        assert not (await lab.ask("evil.example")).answer
        assert not lab.recorder.admitted


async def test_a_stricter_policy_of_a_build_takes_names_away() -> None:
    policy = replace(allowing("*.example"), narrowed_by=(allowing("good.example").base,))
    async with name_server(GOOD) as server, resolving(policy, server) as lab:
        assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]
        assert (await lab.ask("other.example")).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize(("ttl", "sent"), [(0, 5), (1, 5), (17, 17), (86400, 60)])
async def test_the_time_to_live_stays_between_5_and_60_seconds(ttl: int, sent: int) -> None:
    record = f"good.example. {ttl} IN A 93.184.216.34"
    async with name_server(record) as server, resolving(allowing("good.example"), server) as lab:
        answer = await lab.ask("good.example")
        assert answer.answer[0].ttl == sent
        assert lab.recorder.admitted[0][1].seconds == sent + 30


async def test_an_answer_from_the_cache_is_admitted_again() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        for _ in range(5):
            assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]
        assert server.asked["good.example", "A"] == 1
        assert len(lab.recorder.admitted) == 5
        assert lab.metric("offload_dns_cache_requests_total", result="hit") == 4


async def test_a_name_that_does_not_exist_is_remembered() -> None:
    soa = "example. 300 IN SOA ns.example. host.example. 1 2 3 4 20"
    async with name_server(soa) as server, resolving(allowing("*.example"), server) as lab:
        for _ in range(3):
            assert (await lab.ask("gone.example")).rcode() == dns.rcode.NXDOMAIN
        assert server.asked["gone.example", "A"] == 1


async def test_equal_questions_are_asked_once() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        server.delay = 0.1
        answers = await asyncio.gather(*(lab.ask("good.example") for _ in range(20)))
        assert all(addresses(answer) == ["93.184.216.34"] for answer in answers)
        assert server.asked["good.example", "A"] == 1
        assert len(lab.recorder.admitted) == 20


async def test_the_cache_has_a_bound() -> None:
    records = [f"n{number}.example. 60 IN A 93.184.216.{number}" for number in range(6)]
    limits = ViewLimits(cached=3)
    async with (
        name_server(*records) as server,
        resolving(allowing("*.example"), server, limits=limits) as lab,
    ):
        for number in (*range(6), 0):
            await lab.ask(f"n{number}.example")
        assert server.asked["n0.example", "A"] == 2


async def test_types_beside_addresses_are_answered_empty_or_refused() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        for kind in ("HTTPS", "SVCB", "TXT", "MX", "NS", "SOA", "NULL"):
            answer = await lab.ask("good.example", kind)
            assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, []), kind
        for kind in ("ANY", "AXFR"):
            assert (await lab.ask("good.example", kind)).rcode() == dns.rcode.REFUSED
        assert not server.asked
        assert not lab.recorder.refusals


async def test_names_of_addresses_are_refused_and_not_told() -> None:
    async with name_server() as server, resolving(allowing("*.arpa"), server) as lab:
        answer = await lab.ask("34.216.184.93.in-addr.arpa", "PTR")
        assert answer.rcode() == dns.rcode.REFUSED
        assert not lab.recorder.refusals
        assert not server.asked


async def test_records_of_services_name_allowed_hosts_only() -> None:
    records = [
        "_http._tcp.deb.example. 60 IN SRV 10 1 80 mirror.deb.example.",
        "_http._tcp.deb.example. 60 IN SRV 20 1 80 evil.example.",
    ]
    policy = allowing("deb.example", "mirror.deb.example")
    async with name_server(*records) as server, resolving(policy, server) as lab:
        answer = await lab.ask("_http._tcp.deb.example", "SRV")
        assert [str(rdata.target) for rrset in answer.answer for rdata in rrset] == [
            "mirror.deb.example."
        ]
        assert (await lab.ask("_http._tcp.evil.example", "SRV")).rcode() == dns.rcode.REFUSED


async def test_browsers_are_told_to_leave_their_own_dns_off() -> None:
    async with name_server() as server, resolving(allowing(), server) as lab:
        assert (await lab.ask("use-application-dns.net")).rcode() == dns.rcode.NXDOMAIN
        assert not lab.recorder.refusals


async def test_localhost_is_the_asker_itself() -> None:
    async with name_server() as server, resolving(allowing(), server) as lab:
        assert addresses(await lab.ask("localhost")) == ["127.0.0.1"]
        assert addresses(await lab.ask("x.localhost", "AAAA")) == ["::1"]
        assert not lab.recorder.admitted


async def test_a_name_that_is_no_host_name_is_refused() -> None:
    async with name_server() as server, resolving(allowing("*.example"), server) as lab:
        assert (await lab.ask(r"a\010b.example")).rcode() == dns.rcode.REFUSED
        assert not server.asked


async def test_a_firewall_that_fails_fails_the_name() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        lab.recorder.failure = InternalError("the set is full")
        assert (await lab.ask("good.example")).rcode() == dns.rcode.SERVFAIL
        lab.recorder.failure = None
        assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]


async def test_a_policy_that_changes_during_a_lookup_counts() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        server.delay = 0.15
        asking = asyncio.ensure_future(lab.ask("good.example"))
        await asyncio.sleep(0.05)
        assert lab.service.replace_policy("shop", allowing()) == []
        assert (await asking).rcode() == dns.rcode.REFUSED
        assert not lab.recorder.admitted


async def test_a_new_policy_says_what_good_answers_open_under_it() -> None:
    records = [GOOD, "gone.example. 60 IN A 93.184.216.35"]
    async with name_server(*records) as server, resolving(allowing("*.example"), server) as lab:
        await lab.ask("good.example")
        await lab.ask("gone.example")
        kept = lab.service.replace_policy("shop", allowing("good.example", ports=(80, 443)))
        assert {(str(item.address), str(item.grant.ports)) for item in kept} == {
            ("93.184.216.34", "80"),
            ("93.184.216.34", "443"),
        }
        assert all(60 < item.seconds <= 91 for item in kept if not item.open_only)
        assert sum(item.open_only for item in kept) == 2
        assert lab.service.view("shop").name_of("93.184.216.35") == "gone.example"


async def test_a_new_policy_is_not_kept_from_holding_by_too_many_answers(monkeypatch) -> None:
    monkeypatch.setattr("offload_builder.egress.resolver.projectview.MAX_OPEN", 1)
    records = [GOOD, "more.example. 60 IN A 93.184.216.35"]
    async with name_server(*records) as server, resolving(allowing("*.example"), server) as lab:
        await lab.ask("good.example")
        await lab.ask("more.example")
        kept = lab.service.replace_policy("shop", allowing("*.example", ports=(80, 443)))
        assert [str(item.address) for item in kept] == ["93.184.216.35"] * 4


async def test_a_flood_of_refusals_is_told_in_part_and_counted() -> None:
    limits = ViewLimits(refusals_per_second=5)
    async with name_server() as server, resolving(allowing(), server, limits=limits) as lab:
        for number in range(60):
            assert (await lab.ask(f"n{number}.example")).rcode() == dns.rcode.REFUSED
        assert 20 <= len(lab.recorder.refusals) < 50
        left = lab.metric("offload_dns_unreported_refusals_total")
        assert left + len(lab.recorder.refusals) == 60


async def test_more_queries_than_the_bound_get_no_answer() -> None:
    limits = ViewLimits(queries=3)
    async with (
        name_server(behaviour="silent") as server,
        resolving(allowing("*.example"), server, limits=limits) as lab,
    ):
        asked = [asyncio.ensure_future(lab.ask(f"n{number}.example")) for number in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await lab.datagram(dns.message.make_query("x.example", "A").to_wire(), 0.3)
        assert {(await item).rcode() for item in asked} == {dns.rcode.SERVFAIL}
        assert lab.metric("offload_dns_queries_total", result="dropped") == 1


async def many_addresses(lab: Resolving) -> dns.message.Message:
    wire = await lab.datagram(dns.message.make_query("big.example", "A").to_wire())
    return dns.message.from_wire(wire, raise_on_truncation=False)


async def test_a_long_answer_comes_by_tcp() -> None:
    records = [f"big.example. 60 IN A 93.184.216.{number}" for number in range(50)]
    async with name_server(*records) as server, resolving(allowing("big.example"), server) as lab:
        short = await many_addresses(lab)
        assert short.flags & dns.flags.TC
        assert not short.answer
        assert len(addresses(await lab.ask("big.example", tcp=True))) == 50


async def test_one_connection_takes_several_queries() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        wires = [dns.message.make_query("good.example", "A").to_wire() for _ in range(3)]
        assert addresses(dns.message.from_wire(await lab.stream(*wires))) == ["93.184.216.34"]
        assert len(lab.recorder.admitted) == 3


async def test_projects_have_nothing_in_common() -> None:
    async with (
        name_server(GOOD) as server,
        resolving(allowing("good.example"), server) as one,
        resolving(allowing(), server) as other,
    ):
        assert addresses(await one.ask("good.example")) == ["93.184.216.34"]
        assert (await other.ask("good.example")).rcode() == dns.rcode.REFUSED
        assert not other.recorder.admitted


async def test_garbage_changes_nothing() -> None:
    async with name_server(GOOD) as server, resolving(allowing("good.example"), server) as lab:
        for wire in (b"", b"\x00", b"\xff" * 11, b"\xff" * 300):
            with pytest.raises(TimeoutError):
                await lab.datagram(wire, 0.05)
        assert dns.message.from_wire(await lab.datagram(b"\x12\x34\x01" + bytes(9))).rcode() == (
            dns.rcode.FORMERR
        )
        assert addresses(await lab.ask("good.example")) == ["93.184.216.34"]
