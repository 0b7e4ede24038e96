"""Policies for tests, from texts."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime

from offload_builder.egress.policy.evaluate import evaluate
from offload_builder.egress.policy.model import Attempt, Layer, Policy, Protocol, Verdict
from offload_builder.egress.policy.reading import read_text

NOW = datetime(2030, 6, 1, tzinfo=UTC)


def read(text: str, layer: Layer = Layer.POOL) -> Policy:
    return read_text(text, file="policy.toml", layer=layer, now=NOW).require()


def findings(text: str, layer: Layer = Layer.POOL) -> list[str]:
    return [str(item) for item in read_text(text, file="p", layer=layer, now=NOW).findings]


def attempt(
    host: str | None = None,
    address: str | None = None,
    port: int | None = 443,
    protocol: Protocol = Protocol.TCP,
) -> Attempt:
    return Attempt(host, ipaddress.ip_address(address) if address else None, port, protocol)


def judged(policy: object, *args: object, **kwargs: object) -> Verdict:
    return evaluate(policy, attempt(*args, **kwargs), now=NOW)  # type: ignore[arg-type]
