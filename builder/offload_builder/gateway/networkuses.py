"""What builds reached in the network and were refused, gathered from their progress."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, NamedTuple

from offload_builder.egress.policy.evaluate import DEFAULT_DENY
from offload_builder.egress.policy.model import Attempt, Protocol
from offload_builder.egress.policy.targets import parse_host
from offload_builder.egress.urls.locations import OddSourceError, location_of, location_shown
from offload_core.errors import InvalidValueError
from offload_proto.v1.events_pb2 import EgressUse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.egress.policy.model import Address
    from offload_proto.v1.events_pb2 import ProgressBatch

_LOADED = re.compile(r"\bload metadata for (\S+)$")
_PUSHED = re.compile(r"pushing manifest for (\S+?)(?:@sha256:\S+)?$")


class SeenUse(NamedTuple):
    """One thing that a build reached or was refused.

    Attributes:
        build_id: of the build.
        step: name of the step; empty when it is not known.
        use: what it was.
    """

    build_id: str
    step: str
    use: EgressUse


class NetworkUses:
    """Gathers what one build did.

    Registries are reached by the node for the build, where its firewall sees nothing: those that
    the record does not have are taken from the names of steps.
    """

    def __init__(self, build_id: str) -> None:
        self._build_id = build_id
        self._names: dict[str, str] = {}
        self._uses: dict[tuple[object, ...], EgressUse] = {}
        self._images: dict[str, str] = {}

    def take(self, batch: ProgressBatch) -> None:
        """Merge a batch."""
        for vertex in batch.vertices:
            if vertex.name:
                self._names[vertex.digest] = vertex.name
                if found := _LOADED.search(vertex.name):
                    self._images.setdefault(found[1], vertex.digest)
        for status in batch.statuses:
            if found := _PUSHED.match(status.id):
                self._images.setdefault(found[1], status.vertex)
        for use in batch.egress:
            self._uses[_key(use)] = use

    def all(self) -> list[SeenUse]:
        """Return what was refused, then what was reached."""
        uses = [*self._uses.values(), *self._registries()]
        uses.sort(key=lambda use: use.allowed)
        return [SeenUse(self._build_id, self._names.get(use.vertex, ""), use) for use in uses]

    def _registries(self) -> list[EgressUse]:
        known: set[tuple[str, int]] = set()
        for use in self._uses.values():
            attempt = attempt_of(use)
            if attempt is not None:
                known.add((attempt.host or str(attempt.address), attempt.port or 0))
        found: list[EgressUse] = []
        for reference, vertex in self._images.items():
            try:
                place = location_of(f"docker-image://{reference}", {})
            except OddSourceError:
                continue
            if (place.host, place.port) not in known:
                found.append(
                    EgressUse(vertex=vertex, allowed=True, url=place.url, protocol="tcp", count=1)
                )
        return found


def attempts(uses: Iterable[EgressUse]) -> tuple[list[Attempt], list[Attempt]]:
    """Return what was reached, and what only the posture refused, for `policy.learn`."""
    reached: list[Attempt] = []
    refused: list[Attempt] = []
    for use in uses:
        attempt = attempt_of(use)
        if attempt is None:
            continue
        if use.allowed:
            reached.append(attempt)
        elif use.rule_id == DEFAULT_DENY:
            refused.append(attempt)
    return reached, refused


def attempt_of(use: EgressUse) -> Attempt | None:
    """Return a use as policies judge it; None for what says nothing about a place."""
    try:
        protocol = Protocol(use.protocol or "tcp")
        if use.url:
            place = location_shown(use.url)
            literal = _address(place.host)
            host = None if literal is not None else parse_host(place.host)
            # An image or a repository is told by its host: clients fetch more of it than one URL.
            web = place.web if use.url.startswith(("http://", "https://")) else None
            return Attempt(host, literal, place.port or None, protocol, web)
        address = _address(use.address)
        host = parse_host(use.host) if use.host else None
    except (ValueError, InvalidValueError, OddSourceError):
        # A name that no policy could have, such as one with an underscore.
        return None
    if host is None and address is None:
        return None
    return Attempt(host, address, use.port or None, protocol)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text) if text else None
    except ValueError:
        return None


def _key(use: EgressUse) -> tuple[object, ...]:
    place = (use.host, use.address, use.port, use.protocol, use.url)
    return (use.vertex, use.allowed, use.rule_id, *place)
