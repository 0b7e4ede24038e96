"""The firewall, as a project's own namespace sees it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.egress.firewall import links, ruleset
from offload_builder.egress.firewall.nft import NftProgram, open_nft
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.model import (
    Action,
    EffectivePolicy,
    Policy,
    PortRange,
    Posture,
    Protocol,
)
from offload_builder.egress.resolver.contract import Admission, Grant
from offload_core.errors import AccessDeniedError
from tests.fixtures.egressworld import (
    ALLOWED,
    ALLOWED6,
    DENIED,
    DENIED6,
    HOSTS,
    MACHINE,
    MACHINE6,
    METADATA,
    METADATA6,
    PRIVATE,
    USUAL,
    allowlist,
    attempt,
    inside,
    open_policy,
    rule,
    without_check,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

REFUSED = "errno 111"


def named(address: str, *ports: int, seconds: int = 60, protected: bool = False) -> list[Admission]:
    return [
        Admission(
            ipaddress.ip_address(address),
            Grant(Protocol.TCP, PortRange(port, port), private=protected),
            protected,
            seconds,
        )
        for port in ports
    ]


async def test_only_what_the_policy_allows_is_reached(world, watched):
    async with watched.firewall.attach("one", USUAL) as network, inside(network.namespace) as run:
        for host in (ALLOWED, ALLOWED6):
            assert await run(attempt, host) == f"hello from {host}"
        for host in (DENIED, DENIED6, PRIVATE, METADATA, METADATA6):
            assert await run(attempt, host) == REFUSED, host
            assert not (await watched.told_of(host)).allowed
        assert await run(attempt, ALLOWED, 8080) == REFUSED
    assert {own for own, _ in world.requests} == {ALLOWED, ALLOWED6}


async def test_nothing_of_the_node_is_reached(world, watched):
    everything = open_policy(rule("all", "0.0.0.0/0", "::/0", protocol=Protocol.ANY))
    async with (
        watched.firewall.attach("one", everything) as network,
        inside(network.namespace) as run,
    ):
        uplink = str(await world.machine.run(links.local_addresses))
        assert "198.18." in uplink
        for address in await world.machine.run(links.local_addresses):
            for port in (9000, 7450):
                assert await run(attempt, str(address), port) == REFUSED, address
        assert await run(attempt, network.addresses.gateway_v4, 7450) == REFUSED
        assert (await watched.told_of(MACHINE)).stage is Stage.NODE
        assert (await watched.told_of(MACHINE6)).stage is Stage.NODE
    assert world.requests == []


async def test_an_open_posture_keeps_protected_ranges_and_deny_rules(watched):
    policy = open_policy(
        rule("no", f"{DENIED}/32", action=Action.DENY, protocol=Protocol.ANY),
        rule("yes", "203.0.113.0/24", protocol=Protocol.ANY),
    )
    async with watched.firewall.attach("one", policy) as network, inside(network.namespace) as run:
        for host in (ALLOWED, ALLOWED6, DENIED6):
            assert await run(attempt, host) == f"hello from {host}"
        for host in (DENIED, PRIVATE, METADATA, METADATA6):
            assert await run(attempt, host) == REFUSED
        assert (await watched.told_of(DENIED)).stage is Stage.DENIED
        assert (await watched.told_of(PRIVATE)).stage is Stage.PROTECTED


async def test_a_rule_opens_just_its_part_of_a_protected_range(watched):
    policy = open_policy(rule("office", "10.9.9.0/24", ports=PortRange(8000, 8100)))
    async with watched.firewall.attach("one", policy) as network, inside(network.namespace) as run:
        assert await run(attempt, PRIVATE, 8080) == f"hello from {PRIVATE}"
        assert await run(attempt, PRIVATE, 80) == REFUSED


async def test_a_policy_that_narrows_can_only_take_away(watched):
    base = Policy(Posture.OPEN)
    narrow = allowlist(rule("web", ALLOWED, DENIED, PRIVATE)).base
    denies = open_policy(rule("no", DENIED, action=Action.DENY)).base
    policy = EffectivePolicy(base, (narrow, denies))
    async with watched.firewall.attach("one", policy) as network, inside(network.namespace) as run:
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
        for host in (DENIED, ALLOWED6, PRIVATE):
            assert await run(attempt, host) == REFUSED
        await watched.firewall.apply("one", EffectivePolicy(base))
        assert await run(attempt, DENIED) == f"hello from {DENIED}"


async def test_two_projects_with_opposite_rules_know_nothing_of_each_other(world, watched):
    other = allowlist(rule("web", DENIED, DENIED6))
    async with (
        watched.firewall.attach("one", USUAL) as one,
        watched.firewall.attach("two", other) as two,
        inside(one.namespace) as run_one,
        inside(two.namespace) as run_two,
    ):
        found = await asyncio.gather(
            *(run(attempt, host) for run in (run_one, run_two) for host in (ALLOWED, DENIED))
        )
        assert found == [f"hello from {ALLOWED}", REFUSED, REFUSED, f"hello from {DENIED}"]
        await watched.told_of(ALLOWED)
        for host in (two.addresses.daemon_v4, two.addresses.gateway_v4, two.addresses.daemon_v6):
            assert await run_one(attempt, host) == REFUSED
        await watched.told_of(DENIED)
        by_project = {(one.project, str(one.address)) for one in watched.told if one.allowed}
        assert by_project == {("one", ALLOWED), ("two", DENIED)}


async def test_five_reloads_do_not_break_a_download_and_hold_for_what_is_new(watched):
    async with (
        watched.firewall.attach("one", USUAL) as network,
        inside(network.namespace) as run,
        inside(network.namespace) as run_more,
    ):
        download = asyncio.create_task(run(attempt, ALLOWED, 80, 10.0, "/stream/2"))
        await asyncio.sleep(0.3)
        for number in range(5):
            more = [rule(f"r{number}", DENIED)] if number % 2 == 0 else []
            await watched.firewall.apply("one", allowlist(rule("web", ALLOWED), *more))
            await asyncio.sleep(0.1)
        assert await run_more(attempt, DENIED6) == REFUSED
        assert await run_more(attempt, DENIED) == f"hello from {DENIED}"
        assert (await download).endswith("complete")


async def test_a_fast_download_goes_on_while_thousands_of_rules_are_replaced(watched):
    others = [
        rule(f"r{number}", f"45.{number // 250}.{number % 250}.0/24", ports=(443,))
        for number in range(4000)
    ]
    both = [allowlist(rule("web", ALLOWED, ports=ports), *others) for ports in ((80,), (80, 81))]
    async with (
        watched.firewall.attach("one", both[0]) as network,
        inside(network.namespace) as run,
    ):
        download = asyncio.create_task(run(attempt, ALLOWED, 80, 20.0, f"/bytes/{2 << 30}"))
        changes = 0
        while not download.done():
            changes += 1
            await watched.firewall.apply("one", both[changes % 2])
        ended = await download
        assert not ended.startswith("errno") and not ended.endswith("Error")
        assert changes >= 5
    assert not any(told.stage is Stage.DEFAULT for told in watched.told)


async def test_a_change_that_fails_leaves_the_old_policy_in_force(watched):
    async with watched.firewall.attach("one", USUAL) as network, inside(network.namespace) as run:
        with pytest.raises(AccessDeniedError, match="metadata"):
            await watched.firewall.apply("one", open_policy(), named(METADATA, 80))
        assert watched.firewall.policy("one") is USUAL
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
        assert await run(attempt, DENIED) == REFUSED


async def test_a_project_has_so_many_connections_and_leaves_room_for_others(watched, monkeypatch):
    monkeypatch.setattr(ruleset, "MAX_CONNECTIONS", 5)

    def connect() -> socket.socket:
        return socket.create_connection((ALLOWED, 80), timeout=0.7)

    async with (
        watched.firewall.attach("one", USUAL) as one,
        watched.firewall.attach("two", USUAL) as two,
        inside(one.namespace) as run,
        inside(two.namespace) as run_two,
    ):
        some = [await run(connect) for _ in range(5)]
        with pytest.raises(TimeoutError):
            await run(connect)
        assert await run(attempt, DENIED) == REFUSED
        assert await run_two(attempt, ALLOWED) == f"hello from {ALLOWED}"
        for made in some:
            made.close()
        await asyncio.sleep(0.2)
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"


async def test_a_change_that_is_cancelled_leaves_no_doubt_about_what_is_in_force(watched):
    firewall = watched.firewall

    async def stay() -> None:
        async with firewall.attach("brief", open_policy()):
            await asyncio.sleep(60)

    async def cancelled(work: Coroutine[Any, Any, None], seconds: float) -> None:
        task = asyncio.create_task(work)
        await asyncio.sleep(seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async with firewall.attach("one", USUAL) as network, inside(network.namespace) as run:
        for tick in range(12):
            await cancelled(firewall.apply("one", open_policy()), tick / 1000)
            await firewall.apply("one", USUAL)
        assert await run(attempt, DENIED) == REFUSED
        for tick in range(12):
            await cancelled(stay(), 0.03 + tick / 250)
        assert list(firewall._slots.values()) == ["one"]
    rules = await firewall.router.change(f"list table {ruleset.TABLE}")
    assert re.findall(r"(?:chain|set) p\d+_\w+", rules) == []


async def test_addresses_of_names_are_admitted_for_their_time_and_ports(watched):
    admit, policy = watched.firewall.admit, without_check(USUAL)
    async with watched.firewall.attach("one", policy) as network, inside(network.namespace) as run:
        await admit("one", named(DENIED, 80, seconds=2) + named(DENIED6, 8080, seconds=60))
        assert await run(attempt, DENIED) == f"hello from {DENIED}"
        assert await run(attempt, DENIED, 8080) == REFUSED
        assert await run(attempt, DENIED6, 8080) == f"hello from {DENIED6}"
        await admit("one", named(PRIVATE, 80, seconds=2, protected=True))
        await admit("one", named(PRIVATE, 80, seconds=60, protected=True))
        await admit("one", named(PRIVATE, 80, seconds=1, protected=True))
        for ports in (PortRange(70, 85), PortRange(82, 8080), PortRange(8080, 8081)):
            grant = Grant(Protocol.ANY, ports)
            await admit("one", [Admission(ipaddress.ip_address(ALLOWED), grant, False, 60)])
        assert await run(attempt, ALLOWED, 8080) == f"hello from {ALLOWED}"
        await asyncio.sleep(3.2)
        assert await run(attempt, DENIED) == REFUSED
        assert await run(attempt, PRIVATE) == f"hello from {PRIVATE}"
        with pytest.raises(AccessDeniedError):
            await admit("one", named(METADATA, 80))
        await watched.firewall.apply("one", policy, named(DENIED, 80))
        assert await run(attempt, PRIVATE) == REFUSED
        assert await run(attempt, DENIED) == f"hello from {DENIED}"


async def test_an_invented_source_address_goes_nowhere(world, watched):
    async with (
        watched.firewall.attach("one", open_policy()) as network,
        inside(network.namespace) as run,
    ):
        gateway = network.addresses.gateway_v4
        route = f"route add {ALLOWED}/32 dev eth0 src 203.0.113.77 via {gateway}"
        await run(links.run_ip, ["address add 203.0.113.77/32 dev eth0", route])
        assert await run(attempt, ALLOWED, 80, 1.0) == "TimeoutError"
    assert world.requests == []


async def test_a_step_that_removes_all_rules_it_can_see_gains_nothing(watched):
    async with watched.firewall.attach("one", USUAL) as network, inside(network.namespace) as run:

        def flush() -> None:
            nft = open_nft()
            nft.apply("flush ruleset")
            nft.close()

        await run(flush)
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
        for host in set(HOSTS) - {ALLOWED, ALLOWED6}:
            assert await run(attempt, host) == REFUSED


async def test_a_flood_of_refusals_is_counted_in_full_and_told_in_part(watched):
    def flood() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            attempt(DENIED)
        return time.perf_counter() - began

    async with watched.firewall.attach("one", USUAL) as network, inside(network.namespace) as run:
        seconds = await run(flood)
        assert seconds < 5
        assert (await watched.firewall.counts())["one"][Stage.DEFAULT] == 1000
        await watched.told_of(DENIED)
        assert 100 <= len(watched.told) <= 250 + 100 * seconds


async def test_the_program_nft_does_what_the_library_does(world, watched):
    def rules_of(nft: NftProgram) -> str:
        nft.apply(ruleset.base_table(node_addresses=[ipaddress.ip_address(MACHINE)]))
        return nft.apply(f"list table {ruleset.TABLE}")

    assert await world.world.run(lambda: rules_of(NftProgram())) == await world.world.run(
        lambda: rules_of(open_nft())
    )
