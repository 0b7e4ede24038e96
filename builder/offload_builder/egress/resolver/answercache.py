"""Answers that are still good, and which names led to an address."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dns.rdatatype

    from offload_builder.egress.policy.model import Address
    from offload_builder.egress.resolver.answers import Found

    Key = tuple[str, dns.rdatatype.RdataType]


class AnswerCache:
    """At most `limit` answers; the one that was not used for longest makes room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: OrderedDict[Key, tuple[float, Found]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Key) -> tuple[Found, int] | None:
        """Return an answer and the seconds that are left of it, at least 1; None without one."""
        entry = self._found.get(key)
        if entry is None:
            return None
        left = entry[0] - time.monotonic()
        if left <= 0:
            del self._found[key]
            return None
        self._found.move_to_end(key)
        return entry[1], max(1, int(left))

    def put(self, key: Key, found: Found) -> None:
        """Keep an answer for its time."""
        self._found[key] = (time.monotonic() + found.seconds, found)
        self._found.move_to_end(key)
        while len(self._found) > self._limit:
            self._found.popitem(last=False)


class Lead(NamedTuple):
    """A name that led to an address; `ends` is on the clock of `time.monotonic`."""

    name: str
    address: Address
    ends: float


class LeadBook:
    """Which name led to an address last: for reports, and to fill the firewall's lists anew.

    Holds at most `limit` addresses.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._leads: OrderedDict[Address, Lead] = OrderedDict()
        self._held: OrderedDict[tuple[str, Address], Lead] = OrderedDict()

    def note(self, name: str, addresses: tuple[Address, ...], seconds: float) -> None:
        """Take down that a name leads to addresses for some time."""
        ends = time.monotonic() + seconds
        for address in addresses:
            lead = Lead(name, address, ends)
            for book, key in ((self._leads, address), (self._held, (name, address))):
                _keep(book, key, lead, self._limit)

    def name_of(self, address: Address) -> str:
        """Return the name that led to an address last, even if some time ago; empty for none."""
        lead = self._leads.get(address)
        return lead.name if lead is not None else ""

    def all(self) -> Iterator[Lead]:
        """Yield all names with their addresses, the newest first, also when their time is over."""
        yield from list(reversed(self._held.values()))


def _keep(book: OrderedDict[Any, Lead], key: object, lead: Lead, limit: int) -> None:
    book[key] = lead
    book.move_to_end(key)
    while len(book) > limit:
        book.popitem(last=False)
