"""Cases `connect-*`: how long a new connection takes to open."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.egress import rules
from benchmarks.egress.figures import MIDDLE, SLOWEST, quantile
from benchmarks.model import Case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session

RUNS = 20
COUNT = 1_000
_OURS = f"median of {COUNT:,} connections, one after the other, 10,000 rules"
_WORST = f"p99 of {COUNT:,} connections, 10,000 rules"
_NONE = "as many namespaces on the way, nothing of nftables in any of them"
MANY = Case("connect-10k-rules", _OURS, "one rule", unit="us")
MANY_WORST = Case("connect-10k-rules-p99", _WORST, "one rule", unit="us")
FORWARDED = Case("connect-10k-rules-forwarded", _OURS, _NONE, unit="us")
FORWARDED_WORST = Case("connect-10k-rules-forwarded-p99", _WORST, _NONE, unit="us")
CASES = (MANY, MANY_WORST, FORWARDED, FORWARDED_WORST)


def connect(session: Session, ground: Ground) -> None:
    """Measure the cases."""
    firewall = ground.firewall()
    many = ground.enter(firewall.attach("many", rules.effective(rules.many())))
    one = ground.enter(firewall.attach("one", rules.effective(rules.one())))
    forwarded = ground.run(ground.forwarded())
    worst: dict[str, list[float]] = {"many": [], "one": [], "forwarded": []}

    def visits(name: str, namespace: Path) -> Callable[[int], float]:
        def visit(_: int) -> float:
            text = ground.visit_from(namespace, "connect", rules.SERVER, rules.VISITS, COUNT)
            found = [1e6 * seconds for seconds in json.loads(text)]
            worst[name].append(quantile(found, SLOWEST))
            return quantile(found, MIDDLE)

        return visit

    found = session.interleave(
        MANY.name,
        {
            "many": visits("many", many.namespace),
            "one": visits("one", one.namespace),
            "forwarded": visits("forwarded", forwarded.path),
        },
        runs=RUNS,
    )
    # The first of all rounds is the warm-up.
    slow = {name: figures[1:] for name, figures in worst.items()}
    session.report(MANY.name, found["many"], found["one"])
    session.report(MANY_WORST.name, slow["many"], slow["one"])
    session.report(FORWARDED.name, found["many"], found["forwarded"])
    session.report(FORWARDED_WORST.name, slow["many"], slow["forwarded"])
