"""What of the node steps can speak to beside the network: sockets, and its registry's secret."""

from __future__ import annotations

import socket

import pytest

from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.node import NodePool, RawClient

HOST_SOCKET = "offload-test-host-socket"
LISTED = "cat /proc/net/unix | tr '@' '~' | sed 's/^/unix /'"


@pytest.fixture
def machine(world, monkeypatch):
    """The namespace that nodes take for their machine's."""
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    return world.machine


async def test_steps_reach_no_abstract_socket_and_no_repository_of_the_registry(world, machine):
    world.files["/probe"] = egress_probe()
    with socket.socket(socket.AF_UNIX) as listening:
        # Of the node's own namespace, as those of container engines are.
        listening.bind(f"\0{HOST_SOCKET}")
        listening.listen()
        async with NodePool() as pool:
            agent = await pool.start_node(isolation="netns", entitlements=["network.host"])
            runtime = await agent.runtime("default", "")
            registry = runtime.registry_address
            place = f"tcp:{registry}"
            guess = f"status:{registry}/v2/guess/cache/manifests/main"
            asked = f"probe {place} {guess}; {LISTED}"
            assigned = await pool.assigned()
            client = RawClient(await pool.channel(assigned), assigned)
            client.dockerfile += (
                "ADD --chmod=755 http://203.0.113.10/probe /bin/probe\n"
                f"RUN echo usual; {asked}; sleep 1\n"
                f"RUN --network=host echo beside-buildkit; {asked}; sleep 1\n"
                f"RUN --network=none echo none; {asked}; sleep 1\n"
            )
            client.spec.entitlements.append("network.host")
            await client.start()
            result = await client.until("result")
            assert result.HasField("success"), result
            await client.done()
            said: dict[str, str] = {}
            for seen in client.seen:
                for log in seen.progress.logs:
                    said[log.vertex] = said.get(log.vertex, "") + log.data.decode()
            outputs = {text.split("\n", 1)[0]: text for text in said.values()}
            assert set(outputs) == {"usual", "beside-buildkit", "none"}
            for text in outputs.values():
                # No abstract one at all: names with a path lead nowhere in the step's own files.
                assert "unix " in text and "~" not in text and HOST_SOCKET not in text
            assert found_in(outputs["usual"])[place] == "refused"
            assert found_in(outputs["none"])[place] not in ("ok", "refused")
            # It has BuildKit's address; without the secret of a build nothing is there.
            assert found_in(outputs["beside-buildkit"])[place] == "ok"
            assert found_in(outputs["beside-buildkit"])[guess] == "404"
