"""Counters of connections over the life of places, and how they are shown."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.metricsport import MAX_SCRAPES, MetricsPort
from offload_builder.node.nodemetrics import EgressCounts
from offload_core.errors import ConfigError, InternalError


class Kernel:
    """The counters of a router."""

    def __init__(self) -> None:
        self.places: dict[str, dict[Stage, int]] = {}
        self.broken = False

    async def read(self) -> dict[str, dict[Stage, int]]:
        if self.broken:
            raise InternalError("nftables does not answer")
        return self.places


def shown(counts: EgressCounts) -> dict[str, str]:
    registry = CollectorRegistry()
    registry.register(counts)
    lines = generate_latest(registry).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


async def test_counts_of_all_places_of_a_project_are_one_and_outlive_them():
    kernel = Kernel()
    counts = EgressCounts(kernel.read)
    counts.opened("shop", "shop")
    counts.opened("shop~protected", "shop")
    kernel.places = {
        "shop": {Stage.ALLOWED: 3, Stage.DEFAULT: 5},
        "shop~protected": {Stage.ALLOWED: 1},
        "stranger": {Stage.ALLOWED: 100},
    }
    await counts.refresh()
    total = 'offload_egress_allowed_total{project="shop"}'
    assert shown(counts)[total] == "4.0"
    await counts.closing("shop")
    del kernel.places["shop"]
    await counts.refresh()
    assert shown(counts)[total] == "4.0"
    refused = 'offload_egress_refused_total{project="shop",stage="default"}'
    assert shown(counts)[refused] == "5.0"
    # The next one of that name begins at 0.
    counts.opened("shop", "shop")
    kernel.places["shop"] = {Stage.ALLOWED: 2}
    await counts.refresh()
    assert shown(counts)[total] == "6.0"


async def test_what_was_read_last_counts_when_the_kernel_does_not_answer_at_the_end():
    kernel = Kernel()
    counts = EgressCounts(kernel.read)
    counts.opened("shop", "shop")
    kernel.places = {"shop": {Stage.ALLOWED: 3}}
    await counts.refresh()
    kernel.broken = True
    with pytest.raises(InternalError):
        await counts.closing("shop")
    assert shown(counts)['offload_egress_allowed_total{project="shop"}'] == "3.0"


async def asked(address: str, data: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_the_port_answers_one_path_and_survives_what_is_no_http():
    async def broken() -> None:
        raise InternalError("the kernel does not answer")

    async with MetricsPort("127.0.0.1:0", CollectorRegistry()) as port:
        assert (await asked(port.address, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(
            b"HTTP/1.1 200 OK\r\n"
        )
        assert b" 404 " in await asked(port.address, b"GET /x HTTP/1.1\r\n\r\n")
        assert b" 400 " in await asked(port.address, b"hello\r\n\r\n")
        assert await asked(port.address, b"x" * (1 << 17)) == b""
        with pytest.raises(ConfigError, match="metrics"):
            async with MetricsPort(port.address, CollectorRegistry()):
                pass
    async with MetricsPort("127.0.0.1:0", CollectorRegistry(), broken) as port:
        assert b" 500 " in await asked(port.address, b"GET /metrics HTTP/1.1\r\n\r\n")


async def test_many_who_say_nothing_do_not_keep_the_port_for_ever():
    async with MetricsPort("127.0.0.1:0", CollectorRegistry()) as port:
        host, _, number = port.address.rpartition(":")
        idle = [await asyncio.open_connection(host, int(number)) for _ in range(MAX_SCRAPES)]
        assert await asked(port.address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for _, writer in idle:
            writer.close()
        async with asyncio.timeout(5):
            while not await asked(port.address, b"GET /metrics HTTP/1.1\r\n\r\n"):
                await asyncio.sleep(0.02)
