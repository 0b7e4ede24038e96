"""Rights and bounds of steps: what a node permits, and a step that runs out of memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from offload_builder.buildkit.outofmemory import FOLDER
from offload_core.errors import AccessDeniedError, UsageError
from offload_core.status import error_from_rpc
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20
HUNGRY = "RUN : {} && head -c 200000000 /dev/zero | tail -c 200000000 > /dev/null\n"
"""tail keeps what it may have to print."""


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_of(pool: NodePool, steps: str, keys: Any = None) -> RawClient:
    assigned = await pool.assigned(keys)
    return RawClient(await pool.channel(assigned, keys), assigned, steps)


async def result_of(client: RawClient) -> node_pb.Result:
    await client.start()
    result = await client.until("result")
    await client.done()
    return result


async def refusal_of(client: RawClient) -> Any:
    await client.start()
    with pytest.raises(grpc.RpcError) as caught:
        await client.until("result")
    return error_from_rpc(caught.value, peer="the node", unreachable=UsageError)


async def test_step_over_its_memory_is_named_with_limit_and_peak_and_harms_no_other(pool):
    agent = await pool.start_node()
    neighbour = await client_of(pool, "RUN sleep 3; head -c 100000000 /dev/zero | tail -c 90000000 "
                                "> /dev/null && echo neighbour done\n")  # fmt: skip
    client = await client_of(pool, HUNGRY.format("over"))
    client.spec.resources.memory_bytes = 64 * MIB
    beside = asyncio.ensure_future(result_of(neighbour))
    result = await result_of(client)
    assert result.failure.kind == node_pb.Failure.KIND_OUT_OF_MEMORY, result
    assert "limit of 64MiB" in result.failure.message
    assert "its peak was 6" in result.failure.message
    assert "--resource memory=SIZE" in result.failure.message
    assert (await beside).HasField("success")
    await wait_free(agent)


async def test_step_below_a_parent_cgroup_is_named_as_well(pool):
    agent = await pool.start_node()
    client = await client_of(pool, HUNGRY.format("below"))
    client.spec.resources.memory_bytes = 64 * MIB
    client.spec.cgroup_parent = "team/nightly"
    result = await result_of(client)
    assert result.failure.kind == node_pb.Failure.KIND_OUT_OF_MEMORY, result
    assert "limit of 64MiB" in result.failure.message
    await wait_free(agent)


async def test_failure_beside_a_step_that_ran_out_of_memory_is_not_blamed_on_memory(pool):
    await pool.start_node()
    hungry = await client_of(pool, HUNGRY.format("first"))
    hungry.spec.resources.memory_bytes = 64 * MIB
    other = await client_of(pool, "RUN sleep 3; exit 7\n")
    both = await asyncio.gather(result_of(hungry), result_of(other))
    kinds = [result.failure.kind for result in both]
    assert kinds == [node_pb.Failure.KIND_OUT_OF_MEMORY, node_pb.Failure.KIND_BUILD]
    assert both[1].failure.process_exit_code == 7
    assert "memory" not in both[1].failure.message


async def test_node_bounds_every_step_and_refuses_more(pool):
    agent = await pool.start_node(step_memory=48 * MIB, step_memory_max=96 * MIB, step_cpus_max=1.0)
    limits = (
        "RUN cat /sys/fs/cgroup/memory/memory.limit_in_bytes || cat /sys/fs/cgroup/memory.max; {}\n"
    )
    for wanted, shown in ((0, 48 * MIB), (80 * MIB, 80 * MIB)):
        client = await client_of(pool, limits.format(f"true {wanted}"))
        client.spec.resources.memory_bytes = wanted
        assert (await result_of(client)).HasField("success")
        printed = b"".join(entry.data for message in client.seen for entry in message.progress.logs)
        assert str(shown).encode() in printed
    client = await client_of(pool, "")
    client.spec.resources.memory_bytes = 100 * MIB
    error = await refusal_of(client)
    assert isinstance(error, UsageError) and "ask for 96MiB or less" in error.message
    client = await client_of(pool, "")
    client.spec.resources.cpu_quota = 150_000
    error = await refusal_of(client)
    assert isinstance(error, UsageError) and "1.5 processors" in error.message
    await wait_free(agent)


async def test_entitlement_that_the_node_does_not_permit_is_refused_by_name(pool):
    agent = await pool.start_node()
    for name in ("network.host", "security.insecure", "device"):
        client = await client_of(pool, "")
        client.spec.entitlements.append(name)
        error = await refusal_of(client)
        assert isinstance(error, AccessDeniedError) and error.exit_code == 4
        assert f"--allow {name} is refused: node one does not permit it" in error.message
        assert f'entitlements = ["{name}"]' in error.message
    await wait_free(agent)


async def test_step_that_wants_a_right_says_who_gives_it(pool):
    await pool.start_node("one", slots=1)
    failure = (await result_of(await client_of(pool, "RUN --network=host true\n"))).failure
    assert failure.kind == node_pb.Failure.KIND_BUILD
    assert "network.host is not allowed" in failure.message
    assert "The step needs --allow network.host, but node one does not permit it" in failure.message
    await pool.stop_node("one")
    await pool.start_node("two", entitlements=["network.host", "security.insecure"])
    failure = (await result_of(await client_of(pool, "RUN --network=host true\n"))).failure
    assert "Give --allow network.host" in failure.message


async def test_entitlements_work_where_the_node_permits_them_and_not_for_the_untrusted(pool):
    await pool.start_node(entitlements=["network.host", "security.insecure"])
    client = await client_of(
        pool, "RUN --network=host --security=insecure mount -t tmpfs none /mnt || "
        "{ mkdir -p /m && mount -t tmpfs none /m; }\n",
    )  # fmt: skip
    client.spec.entitlements.extend(["network.host", "security.insecure"])
    result = await result_of(client)
    assert result.HasField("success"), result
    token = await pool.gateway.create_token("guest", identity_pb.ROLE_UNTRUSTED)
    keys = await pool.gateway.login(token)
    client = await client_of(pool, "", keys)
    client.spec.entitlements.append("network.host")
    error = await refusal_of(client)
    assert isinstance(error, AccessDeniedError) and "untrusted members" in error.message


async def test_rights_of_one_project_are_not_those_of_another(pool):
    await pool.start_node(
        entitlements=["network.host"], project_entitlements={"default": ["security.insecure"]}
    )
    step = "RUN --security=insecure mkdir -p /m && mount -t tmpfs none /m\n"
    client = await client_of(pool, step)
    client.spec.entitlements.append("security.insecure")
    assert (await result_of(client)).HasField("success")
    client = await client_of(pool, "")
    client.spec.entitlements.append("network.host")
    error = await refusal_of(client)
    assert isinstance(error, AccessDeniedError)
    assert "does not permit it to project default" in error.message
    assert '"network.host" for that project in project_entitlements' in error.message


async def test_record_of_a_step_holds_its_command_and_no_environment(pool):
    agent = await pool.start_node()
    client = await client_of(pool, "ENV PRIVATE=hidden-value\n" + HUNGRY.format("record"))
    client.spec.resources.memory_bytes = 64 * MIB
    assert (await result_of(client)).HasField("failure")
    records = list(agent.config.data.glob(f"projects/*/buildkit/{FOLDER}/*"))
    assert len(records) == 1
    text = records[0].read_text()
    assert "record" in text and "hidden-value" not in text
