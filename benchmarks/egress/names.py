"""Cases `name-lookup*`: a name through the resolver of the firewall, and without it."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from benchmarks.egress import rules
from benchmarks.egress.figures import MIDDLE, SLOWEST, quantile
from benchmarks.egress.visits import DOMAIN
from benchmarks.model import Case
from offload_builder.egress.resolver.metrics import ResolverMetrics
from offload_builder.egress.resolver.service import ResolverService, ResolverSettings
from offload_builder.egress.resolver.upstreams import Server
from tests.fixtures.dnsmasq import dnsmasq

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session

RUNS = 12
COUNT = 200
_DIRECT = "the node's server, asked directly"
FIRST = Case("name-lookup", f"median of {COUNT} new names", _DIRECT, unit="ms")
FIRST_WORST = Case("name-lookup-p99", f"p99 of {COUNT} new names", _DIRECT, unit="ms")
KNOWN = Case("name-lookup-cached", f"median of one name {COUNT} times", _DIRECT, unit="ms")
KNOWN_WORST = Case("name-lookup-cached-p99", f"p99 of one name {COUNT} times", _DIRECT, unit="ms")
CASES = (FIRST, FIRST_WORST, KNOWN, KNOWN_WORST)
_SAME = -1


def lookups(session: Session, ground: Ground) -> None:
    """Measure the cases."""
    server = dnsmasq(ground.work, f"--address=/{DOMAIN}/{rules.SERVER}")
    port = ground.enter_here(server).port
    firewall = ground.firewall()
    policy = rules.effective(rules.many())
    network = ground.enter(firewall.attach("many", policy))
    gateway = network.addresses.gateway_v4
    resolver = ground.enter(
        ResolverService(
            ResolverSettings(servers=(Server("127.0.0.1", port),)),
            book=firewall,
            listener=ground.told,
            metrics=ResolverMetrics(CollectorRegistry()),
        )
    )
    ground.enter(resolver.serving("many", firewall.router.inside, [gateway], policy))
    machine = ground.world.machine.path
    worst: dict[str, list[float]] = {}
    fresh = itertools.count(0, COUNT)

    def asked(
        name: str, namespace: Path, server: str, port: int, first: Callable[[], int]
    ) -> Callable[[int], float]:
        worst[name] = []

        def ask(_: int) -> float:
            text = ground.visit_from(namespace, "lookup", server, port, COUNT, first())
            found = [1000 * seconds for seconds in json.loads(text)]
            worst[name].append(quantile(found, SLOWEST))
            return quantile(found, MIDDLE)

        return ask

    found = session.interleave(
        FIRST.name,
        {
            "first": asked("first", network.namespace, gateway, 53, lambda: next(fresh)),
            "known": asked("known", network.namespace, gateway, 53, lambda: _SAME),
            "direct": asked("direct", machine, "127.0.0.1", port, lambda: next(fresh)),
            "again": asked("again", machine, "127.0.0.1", port, lambda: _SAME),
        },
        runs=RUNS,
    )
    # The first of all rounds is the warm-up.
    slow = {name: figures[1:] for name, figures in worst.items()}
    session.report(FIRST.name, found["first"], found["direct"])
    session.report(FIRST_WORST.name, slow["first"], slow["direct"])
    session.report(KNOWN.name, found["known"], found["again"])
    session.report(KNOWN_WORST.name, slow["known"], slow["again"])
