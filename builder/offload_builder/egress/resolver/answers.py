"""What stands behind a name: a chain of other names, and records at its end."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.rdtypes.IN.SRV
import dns.rrset

if TYPE_CHECKING:
    from offload_builder.egress.policy.model import Address

SHORTEST_SECONDS = 5
LONGEST_SECONDS = 60
MAX_CHAIN = 8
MAX_RECORDS = 64
"""More addresses of one name are left out."""


@dataclass(frozen=True, slots=True)
class Service:
    """One record of a service: where it is offered."""

    priority: int
    weight: int
    port: int
    target: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup found; it stays good for `seconds`.

    Attributes:
        rcode: NOERROR or NXDOMAIN.
        chain: the names that the asked one stands for, in their order.
        addresses: at the end of the chain.
        services: the same for records of services.
        seconds: 5 to 60, whatever the servers said.
    """

    rcode: dns.rcode.Rcode
    chain: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    services: tuple[Service, ...] = ()
    seconds: int = SHORTEST_SECONDS


@dataclass(slots=True)
class Step:
    """What one message says about a name.

    Attributes:
        rest: the name that is still to be asked for; empty when all is known.
    """

    rcode: dns.rcode.Rcode
    chain: list[str]
    addresses: list[Address]
    services: list[Service]
    ttl: int
    rest: str


def clamped(ttl: int) -> int:
    """Return a time to live within our bounds."""
    return max(SHORTEST_SECONDS, min(ttl, LONGEST_SECONDS))


def read_step(
    message: dns.message.Message, name: dns.name.Name, qtype: dns.rdatatype.RdataType
) -> Step:
    """Follow the chain of a message from a name; records beside the chain do not count."""
    aliases: dict[dns.name.Name, dns.rrset.RRset] = {}
    wanted: dict[dns.name.Name, dns.rrset.RRset] = {}
    for rrset in message.answer:
        if rrset.rdclass != dns.rdataclass.IN:
            continue
        if rrset.rdtype == dns.rdatatype.CNAME:
            aliases.setdefault(rrset.name, rrset)
        elif rrset.rdtype == qtype:
            wanted.setdefault(rrset.name, rrset)
    step = Step(message.rcode(), [], [], [], LONGEST_SECONDS, "")
    owner = name
    while owner not in wanted and owner in aliases and len(step.chain) < MAX_CHAIN:
        alias = aliases.pop(owner)
        target = alias[0]
        if not isinstance(target, dns.rdtypes.ANY.CNAME.CNAME):
            break
        step.ttl = min(step.ttl, alias.ttl)
        owner = target.target
        step.chain.append(plain_name(owner))
    if (final := wanted.get(owner)) is not None:
        step.ttl = min(step.ttl, final.ttl)
        _read_records(final, step)
    elif not step.chain or step.rcode == dns.rcode.NXDOMAIN or _ends_here(message):
        step.ttl = min(step.ttl, _negative_ttl(message))
    else:
        step.rest = step.chain[-1]
    return step


def plain_name(name: dns.name.Name) -> str:
    """Return a name in lower case, without a dot at its end."""
    return name.to_text(omit_final_dot=True).lower()


def records_of(
    asked: dns.name.Name, qtype: dns.rdatatype.RdataType, found: Found, seconds: int
) -> list[dns.rrset.RRset]:
    """Return the records that say what was found, with one time to live."""
    records: list[dns.rrset.RRset] = []
    owner = asked
    for link in found.chain:
        target = dns.name.from_text(link)
        alias = dns.rdtypes.ANY.CNAME.CNAME(dns.rdataclass.IN, dns.rdatatype.CNAME, target)
        records.append(dns.rrset.from_rdata(owner, seconds, alias))
        owner = target
    final = [
        *(_address_record(address) for address in found.addresses),
        *(_service_record(service) for service in found.services),
    ]
    if final:
        rrset = dns.rrset.RRset(owner, dns.rdataclass.IN, qtype)
        for rdata in final:
            rrset.add(rdata, seconds)
        records.append(rrset)
    return records


def _address_record(address: Address) -> dns.rdtypes.IN.A.A | dns.rdtypes.IN.AAAA.AAAA:
    if address.version == 4:
        return dns.rdtypes.IN.A.A(dns.rdataclass.IN, dns.rdatatype.A, str(address))
    return dns.rdtypes.IN.AAAA.AAAA(dns.rdataclass.IN, dns.rdatatype.AAAA, str(address))


def _service_record(service: Service) -> dns.rdtypes.IN.SRV.SRV:
    target = dns.name.from_text(service.target)
    return dns.rdtypes.IN.SRV.SRV(
        dns.rdataclass.IN,
        dns.rdatatype.SRV,
        service.priority,
        service.weight,
        service.port,
        target,
    )


def _read_records(rrset: dns.rrset.RRset, step: Step) -> None:
    for rdata in list(rrset)[:MAX_RECORDS]:
        if isinstance(rdata, (dns.rdtypes.IN.A.A, dns.rdtypes.IN.AAAA.AAAA)):
            step.addresses.append(ipaddress.ip_address(rdata.address))
        elif isinstance(rdata, dns.rdtypes.IN.SRV.SRV):
            target = plain_name(rdata.target)
            step.services.append(Service(rdata.priority, rdata.weight, rdata.port, target))


def _negative_ttl(message: dns.message.Message) -> int:
    """Return for how long there is nothing (RFC 2308, section 5)."""
    for rrset in message.authority:
        for rdata in rrset:
            if isinstance(rdata, dns.rdtypes.ANY.SOA.SOA):
                return min(rrset.ttl, rdata.minimum)
    return SHORTEST_SECONDS


def _ends_here(message: dns.message.Message) -> bool:
    """Return whether a message says that the end of its chain has no record of the type."""
    return any(rrset.rdtype == dns.rdatatype.SOA for rrset in message.authority)
