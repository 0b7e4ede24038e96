"""Steps, pulls and sources of a real BuildKit behind the firewall."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from offload_builder.buildkit import (
    BkSession,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_builder.egress.firewall import links
from offload_builder.egress.firewall.ruleset import Stage
from tests.fixtures.buildkit import BASE, build, dockerfile_source
from tests.fixtures.buildstep import isolated, output_of
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import (
    ALLOWED,
    ALLOWED6,
    DENIED,
    DENIED6,
    MACHINE,
    MACHINE6,
    METADATA,
    METADATA6,
    PRIVATE,
    USUAL,
    allowlist,
    inside,
    rule,
)

OK = "ok 23"
RIGHTS = ["network.host", "security.insecure"]
REFUSED_PLACES = [
    *(f"tcp:{host}:80" for host in (DENIED, f"[{DENIED6}]", METADATA, f"[{METADATA6}]", PRIVATE)),
    f"tcp:{ALLOWED}:8080",
    *(f"tcp:{host}:9000" for host in (MACHINE, f"[{MACHINE6}]")),
    f"tcp:{MACHINE}:7450",
    # Name servers and DNS over TLS or HTTPS elsewhere.
    f"tcp:{DENIED}:53",
    f"tcp:{DENIED}:853",
    f"tcp:{DENIED}:443",
]
UNREACHABLE_PLACES = [f"udp:{DENIED}:{port}" for port in (53, 443, 9999)]


@pytest.mark.parametrize("network_of_step", ["", "--network=host "])
async def test_a_step_reaches_what_the_policy_allows_and_nothing_else(watched, network_of_step):
    async with watched.firewall.attach("one", USUAL) as network:
        listener = await watched.firewall.open_registry("one")
        port = listener.getsockname()[1]
        own = network.addresses
        inner = [
            f"tcp:{own.gateway_v4}:22",
            f"tcp:{own.daemon_v4}:80",
            f"tcp:{own.steps_v4[1]}:80",
            "tcp:100.64.16.2:80",
            "tcp:198.18.0.1:80",
        ]
        good = [f"http:{ALLOWED}:80/", f"http:[{ALLOWED6}]:80/"]
        registry = f"tcp:{own.gateway_v4}:{port}"
        places = [*good, *REFUSED_PLACES, *UNREACHABLE_PLACES, *inner, registry, "raw:4"]
        async with isolated(network, entitlements=RIGHTS) as daemon:
            steps = f"RUN {network_of_step}probe {' '.join(places)}\n"
            found = found_in(await output_of(daemon, steps, tuple(RIGHTS)))
        listener.close()
        assert {place: found[place] for place in good} == dict.fromkeys(good, OK)
        assert {place: found[place] for place in [*REFUSED_PLACES, *inner]} == dict.fromkeys(
            [*REFUSED_PLACES, *inner], "refused"
        )
        for place in UNREACHABLE_PLACES:
            assert found[place] == "unreachable"
        assert found["raw:4"] == "forbidden"
        # The daemon's own address is what a step with its network has: the registry guards itself.
        assert found[registry] == ("ok" if network_of_step else "refused")
        told = await watched.told_of(DENIED)
        assert (told.project, told.from_step) == ("one", not network_of_step)
        assert (await watched.told_of(METADATA)).stage is Stage.PROTECTED
        assert (await watched.told_of(MACHINE)).stage is Stage.NODE


async def test_a_step_without_a_network_has_none(world, watched):
    async with watched.firewall.attach("one", USUAL) as network, isolated(network) as daemon:
        found = found_in(await output_of(daemon, f"RUN --network=none probe tcp:{ALLOWED}:80\n"))
        assert found == {f"tcp:{ALLOWED}:80": "unreachable"}
    assert world.requests == []


async def test_steps_that_run_at_the_same_time_do_not_reach_each_other(watched):
    async with watched.firewall.attach("one", USUAL) as network, isolated(network) as daemon:
        others = " ".join(f"tcp:{network.addresses.steps_v4[n]}:7000" for n in range(2, 8))
        steps = f"""\
FROM scratch AS base
COPY --chmod=755 busybox /bin/busybox
COPY --chmod=755 probe /bin/probe
SHELL ["/bin/busybox", "sh", "-c"]
FROM base AS server
RUN busybox ip addr; (busybox nc -ll -p 7000 -e busybox echo leak & busybox sleep 3); touch /s
FROM base AS asker
RUN busybox sleep 1; probe {others}; busybox touch /a
FROM scratch
COPY --from=server /s /
COPY --from=asker /a /
"""
        source_steps = steps.replace("touch /s", "busybox touch /s")
        source = dockerfile_source(source_steps, {"probe": egress_probe()})
        spec = SolveSpec({"filename": "Dockerfile"})
        async with BkSession(daemon.client, "k", SessionProviders(source=source)) as session:
            solving = asyncio.create_task(daemon.client.solve(spec, session))
            text = b""
            async for batch in daemon.client.status(spec.ref):
                text += b"".join(log.data for log in batch.logs)
            assert isinstance(await solving, SolveResult)
        found = found_in(text.decode())
        own = [place for place, result in found.items() if place.startswith("tcp:")]
        assert len(own) == 6
        assert "ok" not in found.values()


async def test_only_the_router_tracks_what_steps_open(watched):
    count = "netfilter/nf_conntrack_count"
    router = watched.firewall.router.inside
    async with (
        watched.firewall.attach("one", USUAL) as network,
        isolated(network, entitlements=RIGHTS) as daemon,
        inside(network.namespace) as run,
    ):
        step = f"probe http:{ALLOWED}:80/ http:[{ALLOWED6}]:80/\n"
        assert list(found_in(await output_of(daemon, f"RUN {step}")).values()) == [OK, OK]
        assert await run(links.read_setting, count) == "0"
        assert int(await router.run(links.read_setting, count)) >= 2
        # What has BuildKit's own address is: answers to it pass the second line.
        host = await output_of(daemon, f"RUN --network=host {step}", tuple(RIGHTS))
        assert list(found_in(host).values()) == [OK, OK]
        assert await run(links.read_setting, count) == "2"


async def test_sources_and_pulls_of_buildkit_obey_too(world, watched):
    async with watched.firewall.attach("one", USUAL) as network, isolated(network) as daemon:
        for line, works in (
            (f"ADD http://{ALLOWED}/ /file\n", True),
            (f"ADD http://{DENIED}/ /file\n", False),
            (f"ADD http://{METADATA}/ /file\n", False),
            (f"ADD http://{DENIED}/repository.git /file\n", False),
            (f"COPY --from={DENIED}:80/library/image / /file\n", False),
        ):
            providers = SessionProviders(source=dockerfile_source(BASE + line))
            found = await build(daemon.client, providers)
            assert isinstance(found, SolveResult if works else SolveFailure), (line, found)
        assert not (await watched.told_of(DENIED)).from_step
    assert {own for own, _ in world.requests} == {ALLOWED}


async def test_a_step_with_all_rights_of_its_namespace_does_not_get_out(world, watched):
    async with watched.firewall.attach("one", USUAL) as network:
        async with isolated(network, entitlements=RIGHTS) as daemon:
            bad = f"tcp:{DENIED}:80 tcp:{METADATA}:80"
            steps = f"""\
RUN --security=insecure --network=host \\
    busybox ip addr add 203.0.113.77/32 dev eth0; busybox ip route add {METADATA} dev eth0; \\
    busybox ip link add o type dummy; busybox ip addr flush dev o; probe {bad} raw:4
"""
            found = found_in(await output_of(daemon, steps, tuple(RIGHTS)))
        assert found["raw:4"] == "forbidden"
        assert found[f"tcp:{DENIED}:80"] == "refused"
        assert found[f"tcp:{METADATA}:80"] != "ok"
    assert world.requests == []


async def test_a_killed_daemon_starts_again_in_its_place(watched):
    async with watched.firewall.attach("one", USUAL) as network, isolated(network) as daemon:
        for number in range(2):
            steps = f"RUN echo {number}; probe http:{ALLOWED}:80/ tcp:{DENIED}:80\n"
            found = found_in(await output_of(daemon, steps))
            assert found == {f"http:{ALLOWED}:80/": OK, f"tcp:{DENIED}:80": "refused"}
            assert daemon.pid is not None
            os.kill(daemon.pid, signal.SIGKILL)
            await asyncio.wait_for(asyncio.shield(daemon.exited), 10)
            await daemon.ensure_running()


async def test_two_projects_build_under_opposite_policies(watched):
    other = allowlist(rule("web", DENIED))
    places = f"tcp:{ALLOWED}:80 tcp:{DENIED}:80"
    async with (
        watched.firewall.attach("one", USUAL) as one,
        watched.firewall.attach("two", other) as two,
        isolated(one) as daemon_one,
        isolated(two) as daemon_two,
    ):
        found = await asyncio.gather(
            *(output_of(daemon, f"RUN probe {places}\n") for daemon in (daemon_one, daemon_two))
        )
    assert list(found_in(found[0]).values()) == ["ok", "refused"]
    assert list(found_in(found[1]).values()) == ["refused", "ok"]
