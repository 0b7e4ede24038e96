"""The names of one project: verdict, lookup, entry in the firewall, answer."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import dns.edns
import dns.rcode
import dns.rdatatype
import structlog

from offload_builder.egress.policy.model import Layer
from offload_builder.egress.resolver.answercache import AnswerCache, LeadBook
from offload_builder.egress.resolver.answers import Found, clamped, records_of
from offload_builder.egress.resolver.contract import Admission, Answered, Refusal
from offload_builder.egress.resolver.lookup import Lookup
from offload_builder.egress.resolver.queries import (
    Extra,
    RefusedQueryError,
    UnanswerableError,
    read_query,
    write_answer,
)
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from offload_builder.egress.policy.model import Address, ProtectedRange
    from offload_builder.egress.resolver.contract import AddressBook, NameListener
    from offload_builder.egress.resolver.metrics import ResolverMetrics
    from offload_builder.egress.resolver.nameview import NameVerdict, NameView
    from offload_builder.egress.resolver.queries import Query
    from offload_builder.egress.resolver.upstream import Asker

_log = structlog.get_logger(__name__)

DOH_CANARY = "use-application-dns.net"
"""Programs that bring their own encrypted DNS leave it off where this name does not exist."""
_ADDRESSES = (dns.rdatatype.A, dns.rdatatype.AAAA)
_FIRST_META, _LAST_META = 128, 255
_ADMIT_SECONDS = 2.0
_LOCAL_SECONDS = 60
OPEN_SECONDS = 86_400
"""How long after its answer a name counts for a connection that is open."""
MAX_OPEN = 16_384
"""Addresses with ports that are kept at a change, and that open connections may have then.

The newest ones count. More of them, or an error for them, would keep a new policy from being put in
force.
"""
_CONNECTED_SECONDS = 15


@dataclass(frozen=True, slots=True)
class ViewLimits:
    """Bounds of one project.

    Attributes:
        queries: that are worked on together; more are dropped, and clients ask again.
        lookups: questions to servers that are open together.
        cached: answers that are kept.
        leads: addresses whose names are remembered.
        grace_seconds: how much longer than its answer is good an address can be reached.
        refusals_per_second: told to the listener, with four seconds' worth at once.
    """

    queries: int = 512
    lookups: int = 64
    cached: int = 4096
    leads: int = 16384
    grace_seconds: int = 30
    refusals_per_second: float = 50.0


class ProjectView:
    """Answers the queries of one project.

    Args:
        project: identifier.
        names: its policy.
        book: the firewall.
        listener: hears of refusals and answers.
        asker: asks the servers of the node.
        connected: returns the address that stands for a name which a connector serves.
    """

    def __init__(
        self,
        project: str,
        names: NameView,
        *,
        book: AddressBook,
        listener: NameListener,
        asker: Asker,
        metrics: ResolverMetrics,
        limits: ViewLimits,
        connected: Callable[[str], Address],
    ) -> None:
        self.project = project
        self._names = names
        self._book = book
        self._listener = listener
        self._metrics = metrics
        self._limits = limits
        self._connected = connected
        self._lookup = Lookup(asker, AnswerCache(limits.cached), metrics, limits.lookups)
        self._leads = LeadBook(limits.leads)
        self._busy = 0
        self._allowance = 4 * limits.refusals_per_second
        self._allowed_at = time.monotonic()

    def replace_names(self, names: NameView) -> None:
        """Take another policy; queries that wait for a server are judged by it as well.

        Empty the firewall's list of names after this, and fill it with `live_admissions`.
        """
        self._names = names

    def live_admissions(self) -> list[Admission]:
        """Return what earlier answers open under the policy of now.

        Those that are still good for everything, all of the last day for open connections.
        """
        now = time.monotonic()
        found: list[Admission] = []
        past: list[Admission] = []
        verdicts: dict[str, NameVerdict] = {}
        for lead in self._leads.all():
            verdict = verdicts.get(lead.name) or self._names.judge(lead.name)
            verdicts[lead.name] = verdict
            if self._names.shuts_out(lead.address, verdict.grants) is not None:
                continue
            left = int(lead.ends - now) + 1
            admissions = self._admissions(verdict, [lead.address], left)
            if left > 0 and len(found) < MAX_OPEN:
                found += admissions
            longer = left + OPEN_SECONDS
            if longer > 0 and len(past) < MAX_OPEN:
                past += [replace(one, seconds=longer, open_only=True) for one in admissions]
        return found + past

    def name_of(self, address: str) -> str:
        """Return the name that led to an address last; empty for none."""
        return self._leads.name_of(ipaddress.ip_address(address))

    async def close(self) -> None:
        """End what is open."""
        await self._lookup.close()

    def drop(self) -> None:
        """Count a query that gets no answer because there are too many."""
        self._metrics.dropped.inc()

    async def answer(self, wire: bytes, source: str, *, limit: int = 0) -> bytes | None:
        """Return the answer to a query; None when it gets none.

        Args:
            wire: what was sent.
            source: address that sent it.
            limit: bytes of the longest answer; 0 for what the query says.
        """
        if self._busy >= self._limits.queries:
            self.drop()
            return None
        self._busy += 1
        began = time.perf_counter()
        try:
            return await self._answer(wire, source, limit)
        finally:
            self._busy -= 1
            self._metrics.seconds.observe(time.perf_counter() - began)

    async def _answer(self, wire: bytes, source: str, limit: int) -> bytes | None:
        try:
            query = read_query(wire)
        except UnanswerableError:
            self._metrics.malformed.inc()
            return None
        except RefusedQueryError as error:
            self._metrics.malformed.inc()
            return error.answer
        limit = limit or query.udp_bytes
        try:
            reply = _known(query) or await self._judged(query, source)
        except OffloadError as error:
            _log.error("dns.query.failed", project=self.project, error=error.message)
            reply = _Reply(dns.rcode.SERVFAIL)
        self._count(reply.rcode)
        records = (
            records_of(query.message.question[0].name, query.qtype, reply.found, reply.seconds)
            if reply.found is not None
            else ()
        )
        return write_answer(query, reply.rcode, records, limit=limit, extra=reply.extra)

    async def _judged(self, query: Query, source: str) -> _Reply:
        if query.qtype == dns.rdatatype.PTR or query.name.endswith(".arpa"):
            # Programs ask for the name of an address out of habit; that is nothing to tell.
            return _Reply(dns.rcode.REFUSED, extra=_blocked("names of addresses are not told"))
        verdict = self._verdict(query)
        if not verdict.allowed:
            return self._refuse(query, source, verdict)
        if query.qtype == dns.rdatatype.SRV and not verdict.connected:
            return await self._services(query)
        if query.qtype not in _ADDRESSES:
            meta = _FIRST_META <= query.qtype <= _LAST_META
            extra = _blocked("only A, AAAA and SRV are answered")
            return _Reply(dns.rcode.REFUSED if meta else dns.rcode.NOERROR, extra=extra)
        if verdict.connected:
            return self._by_connector(query, source, verdict)
        return await self._addresses(query, source)

    def _verdict(self, query: Query) -> NameVerdict:
        name = query.name if query.is_host_name else ""
        verdict = self._names.judge(name)
        if not verdict.allowed and query.qtype == dns.rdatatype.SRV:
            # _http._tcp.example.org is a question about example.org.
            return self._names.judge(_without_service(name))
        return verdict

    def _refuse(self, query: Query, source: str, verdict: NameVerdict) -> _Reply:
        self._tell(query, source, verdict, verdict.rule_id, verdict.reason)
        return _Reply(dns.rcode.REFUSED, extra=_blocked(verdict.reason))

    async def _addresses(self, query: Query, source: str) -> _Reply:
        found, seconds = await self._lookup.find(query.name, query.qtype)
        # The policy may be another one since.
        verdict = self._verdict(query)
        if not verdict.allowed:
            return self._refuse(query, source, verdict)
        if verdict.connected:
            return self._by_connector(query, source, verdict)
        addresses, extra = self._kept(query, source, verdict, found)
        seconds = clamped(seconds)
        if addresses:
            await self._admit(query, source, verdict, addresses, seconds)
        kept = Found(found.rcode, found.chain, addresses)
        return _Reply(found.rcode, kept, seconds, extra)

    def _by_connector(self, query: Query, source: str, verdict: NameVerdict) -> _Reply:
        """Answer with an address of the node that stands for the name; nobody is asked."""
        if query.qtype != dns.rdatatype.A:
            return _Reply(dns.rcode.NOERROR)
        address = self._connected(query.name)
        self._listener.answered(self._answered(query, source, verdict, (address,)))
        found = Found(dns.rcode.NOERROR, (), (address,))
        return _Reply(dns.rcode.NOERROR, found, _CONNECTED_SECONDS)

    def _kept(
        self, query: Query, source: str, verdict: NameVerdict, found: Found
    ) -> tuple[tuple[Address, ...], Extra | None]:
        """Leave out the addresses in protected ranges, which a public name must not lead to."""
        kept: list[Address] = []
        left_out: list[tuple[Address, ProtectedRange]] = []
        for address in found.addresses:
            shut = self._names.shuts_out(address, verdict.grants)
            if shut is None:
                kept.append(address)
            else:
                left_out.append((address, shut))
        if not left_out:
            return tuple(kept), None
        self._metrics.stripped.inc(len(left_out))
        shown = tuple(str(address) for address, _ in left_out)
        shut = left_out[0][1]
        reason = f"{query.name} leads to {shown[0]} ({shut.about}), which is protected"
        self._tell(query, source, verdict, f"protected-{shut.kind}", reason, shown)
        return tuple(kept), _blocked(reason)

    async def _admit(
        self,
        query: Query,
        source: str,
        verdict: NameVerdict,
        addresses: tuple[Address, ...],
        seconds: int,
    ) -> None:
        held = seconds + self._limits.grace_seconds
        # Nothing may wait between the verdict and this call: the firewall keeps their order.
        admissions = self._admissions(verdict, addresses, held)
        if admissions:
            with self._metrics.admit_seconds.time():
                try:
                    async with asyncio.timeout(_ADMIT_SECONDS):
                        await self._book.admit(self.project, admissions)
                except TimeoutError as error:
                    raise OffloadError("the firewall did not take an address in time") from error
        self._leads.note(query.name, addresses, held)
        self._listener.answered(self._answered(query, source, verdict, addresses))

    def _answered(
        self, query: Query, source: str, verdict: NameVerdict, addresses: tuple[Address, ...]
    ) -> Answered:
        return Answered(
            time=time.time(),
            project=self.project,
            source=source,
            name=query.name,
            rule_id=verdict.rule_id,
            addresses=tuple(str(address) for address in addresses),
        )

    def _admissions(
        self, verdict: NameVerdict, addresses: Sequence[Address], seconds: int
    ) -> list[Admission]:
        return list(self._each_admission(verdict, addresses, seconds))

    def _each_admission(
        self, verdict: NameVerdict, addresses: Sequence[Address], seconds: int
    ) -> Iterator[Admission]:
        for address in addresses:
            protected = self._names.is_protected(address)
            if not protected and not verdict.listed:
                continue
            for grant in verdict.grants:
                if grant.private or not protected:
                    yield Admission(address, grant, protected, seconds)

    async def _services(self, query: Query) -> _Reply:
        found, seconds = await self._lookup.find(query.name, query.qtype)
        kept = tuple(
            service for service in found.services if self._names.judge(service.target).allowed
        )
        return _Reply(found.rcode, Found(found.rcode, found.chain, (), kept), clamped(seconds))

    def _tell(
        self,
        query: Query,
        source: str,
        verdict: NameVerdict,
        rule_id: str,
        reason: str,
        addresses: tuple[str, ...] = (),
    ) -> None:
        # The name of a place begins with that of its project.
        self._metrics.names_refused.labels(self.project.partition("~")[0]).inc()
        if not self._may_tell():
            self._metrics.unreported.inc()
            return
        self._listener.refused(
            Refusal(
                time=time.time(),
                project=self.project,
                source=source,
                name=query.name,
                qtype=query.type_name,
                rule_id=rule_id,
                rule_text=verdict.rule_text,
                place=verdict.place,
                reason=reason,
                addresses=addresses,
                # Protected ranges are the pool's business.
                layer=Layer.POOL if addresses else verdict.layer,
            )
        )

    def _may_tell(self) -> bool:
        """Take one of the refusals that may be told now; a flood of them is counted only."""
        now = time.monotonic()
        rate = self._limits.refusals_per_second
        gained = (now - self._allowed_at) * rate
        self._allowance = min(4 * rate, self._allowance + gained)
        self._allowed_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _count(self, rcode: dns.rcode.Rcode) -> None:
        if rcode == dns.rcode.REFUSED:
            self._metrics.refused.inc()
        elif rcode == dns.rcode.SERVFAIL:
            self._metrics.failed.inc()
        else:
            self._metrics.answered.inc()


@dataclass(frozen=True, slots=True)
class _Reply:
    rcode: dns.rcode.Rcode
    found: Found | None = None
    seconds: int = 0
    extra: Extra | None = None


def _known(query: Query) -> _Reply | None:
    """Answer the names that mean the same everywhere (RFC 6761)."""
    if query.name == DOH_CANARY:
        return _Reply(dns.rcode.NXDOMAIN)
    if query.name != "localhost" and not query.name.endswith(".localhost"):
        return None
    loopback = {dns.rdatatype.A: "127.0.0.1", dns.rdatatype.AAAA: "::1"}.get(query.qtype)
    here = (ipaddress.ip_address(loopback),) if loopback else ()
    return _Reply(dns.rcode.NOERROR, Found(dns.rcode.NOERROR, (), here), _LOCAL_SECONDS)


def _without_service(name: str) -> str:
    while name.startswith("_"):
        name = name.partition(".")[2]
    return name


def _blocked(text: str) -> Extra:
    return Extra(dns.edns.EDECode.BLOCKED, text)
