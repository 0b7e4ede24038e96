"""Addresses that names led to, as elements of a project's sets, each until its time is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_builder.egress.firewall.elements import ICMP_NAMES, transport_names
from offload_builder.egress.firewall.ruleset import NAMES_SIZE, TABLE
from offload_builder.egress.policy.model import PortRange, Protocol, protected_range
from offload_core.errors import AccessDeniedError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from offload_builder.egress.resolver.contract import Admission

_Key = tuple[str, str]
_Ends = dict[PortRange, float]
MIN_SECONDS = 1
_SWEEP_SECONDS = 1.0
"""Looking through all elements for each answer would take longer than the answer."""
_LATE_SECONDS = 2.0
"""The kernel may have a range for so much longer, as its time is in whole seconds."""


class NameBook:
    """Knows until when each element is in the sets of one project.

    `plan` says what to do; `commit` takes over what was done. So a change that nftables refused
    leaves the book as it was.

    Args:
        name: what the names of the project's sets begin with.
        clock: seconds; for tests.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._ends: dict[_Key, float] = {}
        self._ranges: dict[_Key, _Ends] = {}
        self._sweep_at = 0.0

    def __len__(self) -> int:
        """Return how many elements are in the sets now, or were a second ago."""
        self._forget()
        return len(self._ends) + sum(map(len, self._ranges.values()))

    def plan(self, admissions: Iterable[Admission]) -> Plan:
        """Return the change that admits addresses; what is there already gets the later end.

        Raises:
            AccessDeniedError: an address is protected, and the admission does not say that the
                policy opens it.
            QuotaExceededError: there are too many.
        """
        self._forget()
        plan = Plan()
        now = self._clock()
        for admission in admissions:
            _check(admission)
            self._admit(plan, admission, now + max(MIN_SECONDS, admission.seconds), now)
        new = sum(key not in self._ends for key in plan.ends)
        # All ranges of an address with a protocol count as one.
        new += sum(key not in self._ranges for key in plan.ranges)
        if len(self._ends) + len(self._ranges) + new > NAMES_SIZE:
            raise QuotaExceededError(
                f"names of one project led to more than {NAMES_SIZE} addresses at a time"
            )
        return plan

    def commit(self, plan: Plan) -> None:
        """Take over what was done."""
        self._ends.update(plan.ends)
        self._ranges.update(plan.ranges)

    def _admit(self, plan: Plan, admission: Admission, end: float, now: float) -> None:
        grant, address = admission.grant, str(admission.address)
        version = admission.address.version
        ports = grant.ports
        if ports is None:
            if grant.protocol is Protocol.ANY:
                self._put(plan, (f"{self._name}_all{version}", address), end, now)
                return
            icmp = grant.protocol is Protocol.ICMP
            name = ICMP_NAMES[version] if icmp else grant.protocol.value
            self._put(plan, (f"{self._name}_whole{version}", f"{address} . {name}"), end, now)
            return
        for name in transport_names(grant.protocol):
            if ports.first == ports.last:
                element = f"{address} . {name} . {ports.first}"
                self._put(plan, (f"{self._name}_port{version}", element), end, now)
            else:
                self._put_range(plan, version, (address, name), ports, end, now)

    def _put(self, plan: Plan, key: _Key, end: float, now: float) -> None:
        if max(plan.ends.get(key, 0.0), self._ends.get(key, 0.0)) >= end:
            return
        plan.ends[key] = end
        plan.lines += _renewed(*key, end - now)

    def _put_range(
        self, plan: Plan, version: int, key: _Key, ports: PortRange, end: float, now: float
    ) -> None:
        # Ranges in a set must not overlap: those that do become one.
        name, what = f"{self._name}_range{version}", " . ".join(key)
        there = dict(plan.ranges.get(key) or self._ranges.get(key, {}))
        for old, until in list(there.items()):
            if old.first <= ports.last and ports.first <= old.last:
                if old.covers(ports) and until >= end:
                    return
                del there[old]
                plan.lines += _renewed(name, f"{what} . {old}", until - now)[:2]
                if until > now:
                    ports = PortRange(min(ports.first, old.first), max(ports.last, old.last))
                    end = max(end, until)
        there[ports] = end
        plan.ranges[key] = there
        plan.lines += _renewed(name, f"{what} . {ports}", end - now)

    def _forget(self) -> None:
        now = self._clock()
        if now < self._sweep_at:
            return
        self._sweep_at = now + _SWEEP_SECONDS
        self._ends = {key: end for key, end in self._ends.items() if end > now}
        left = (
            (key, {ports: end for ports, end in ends.items() if end + _LATE_SECONDS > now})
            for key, ends in self._ranges.items()
        )
        self._ranges = {key: ends for key, ends in left if ends}


class Plan:
    """A change of the sets, and what of the book it changes."""

    def __init__(self) -> None:
        self.ends: dict[_Key, float] = {}
        self.ranges: dict[_Key, _Ends] = {}
        self.lines: list[str] = []

    @property
    def text(self) -> str:
        """The change in nft's language; empty when nothing is to be done."""
        return "".join(f"{line}\n" for line in self.lines)


def _renewed(name: str, element: str, seconds: float) -> list[str]:
    # Not every kernel gives an element that is there a new end, so it is taken out first; and to
    # take out one that may have ended since, it is put in before that.
    body = f"element {TABLE} {name} {{ {element} timeout {max(MIN_SECONDS, round(seconds))}s }}"
    return [f"add {body}", f"delete element {TABLE} {name} {{ {element} }}", f"add {body}"]


def _check(admission: Admission) -> None:
    found = protected_range(admission.address)
    if found is not None and not (admission.protected and found.openable):
        raise AccessDeniedError(
            f"{admission.address} is protected ({found.about}) and no name may lead there"
        )
