"""Devices in builds behind the firewall: given as elsewhere, and no way around it."""

from __future__ import annotations

import asyncio

import pytest

from tests.fixtures.cdi import HAVE, KIND, write_specification
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import ALLOWED, MACHINE, METADATA, PRIVATE
from tests.fixtures.node import NodePool, RawClient

GPU = f"{KIND}=all"


@pytest.fixture
def machine(world, monkeypatch):
    """The namespace that nodes take for their machine's."""
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    return world.machine


async def test_step_with_a_device_is_behind_the_firewall(world, machine, tmp_path):
    places = [f"http:{ALLOWED}:80/", f"tcp:{MACHINE}:7450", f"tcp:{METADATA}:80"]
    places.append(f"tcp:{PRIVATE}:80")
    world.files["/probe"] = egress_probe()
    write_specification(tmp_path / "cdi")
    steps = (
        "ADD --chmod=755 http://203.0.113.10/probe /bin/probe\n"
        f"RUN --device={GPU},required {HAVE} && probe {' '.join(places)}\n"
        # Its own device node is no way to the device for a step that has none.
        "RUN mknod /mine c 10 237 && ! ( : < /mine )\n"
    )
    async with NodePool() as pool:
        await pool.start_node(
            isolation="netns", entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"]
        )
        assigned = await pool.assigned(devices=[GPU])
        client = RawClient(await pool.channel(assigned), assigned, steps)
        client.spec.entitlements.append(f"device={GPU}")
        await client.start()
        async with asyncio.timeout(60):
            result = await client.until("result")
        assert result.HasField("success"), result
        await client.done()
        text = b"".join(log.data for seen in client.seen for log in seen.progress.logs).decode()
        found = found_in(text)
        assert "has-device" in text
        assert [found[place] for place in places] == ["ok 23", "refused", "refused", "refused"]
