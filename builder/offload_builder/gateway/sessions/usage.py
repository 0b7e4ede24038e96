"""How much time members have used in sessions, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.gateway.sessions.cost import amount
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.gateway.sessions.table import SessionTotal


@dataclass
class MemberUsage:
    """What one member used.

    Attributes:
        member: the member.
        sessions: how many.
        used_milliseconds: their time.
        micros: what it cost, in millionths of `currency`.
        currency: of the pool's rates; empty where none of the sessions had any.
    """

    member: str
    sessions: int = 0
    used_milliseconds: int = 0
    micros: int = 0
    currency: str = ""

    def message(self) -> sessions_pb.SessionUsage:
        """Return it as the API shows it."""
        found = sessions_pb.SessionUsage(member=self.member, sessions=self.sessions)
        found.used.FromMilliseconds(self.used_milliseconds)
        if self.currency:
            found.cost.micros, found.cost.currency = self.micros, self.currency
        return found


def sum_up(totals: Iterable[SessionTotal], currency: str) -> list[MemberUsage]:
    """Return what each member used, those with the longest time first.

    Args:
        totals: of all sessions that count.
        currency: of the pool's rates now. Amounts in another one, from before, are left out;
            where the pool has no rates now, the newest that there is counts.
    """
    found: dict[str, MemberUsage] = {}
    listed = list(totals)
    priced = [item for item in listed if item.currency]
    if priced and not currency:
        currency = max(priced, key=lambda item: item.newest_at).currency
    for total in listed:
        usage = found.setdefault(total.owner, MemberUsage(total.owner, currency=currency))
        usage.sessions += total.sessions
        usage.used_milliseconds += total.used_milliseconds
        if total.currency == currency:
            usage.micros += amount(total.used_milliseconds, total.micros_per_hour)
    return sorted(found.values(), key=lambda item: (-item.used_milliseconds, item.member))
