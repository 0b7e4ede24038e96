"""Devices of nodes in builds: who gets them, where, and who is refused."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from structlog.testing import capture_logs

from offload_builder.gateway.scheduler import rank_nodes
from offload_core.devices import wanted_devices
from offload_core.errors import AccessDeniedError, DeviceUnavailableError, UsageError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.identity_service_pb2_grpc import AdminServiceStub
from tests.fixtures.buildx import Buildx
from tests.fixtures.cdi import HAVE, HAVE_NOT, KIND, write_specification
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_proto.v1 import node_service_pb2 as node_pb

GPU = f"{KIND}=all"
STEP = f"RUN --device={GPU},required {HAVE}\n"
OPTIONAL = f"RUN --device={GPU},required=false {HAVE_NOT}\nRUN --device={GPU} {HAVE_NOT}\n"
TOLD_SECONDS = 10.0


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool(restart_grace=0.1) as running:
        yield running


async def told(pool: NodePool, name: str, *devices: str) -> None:
    """Wait until the gateway knows that a node has these devices, and nothing else."""
    stub = AdminServiceStub(await pool.gateway.channel(pool.keys))
    async with asyncio.timeout(TOLD_SECONDS):
        while True:
            reply = await stub.ListNodes(identity_pb.ListNodesRequest(), metadata=call_metadata())
            found = {node.node_id: list(node.devices) for node in reply.nodes}
            node = pool.gateway.gateway._nodes.find(name)
            if node is not None and node.surveyed and found[name] == list(devices):
                return
            await asyncio.sleep(0.05)


async def client_of(pool: NodePool, steps: str, *allow: str, keys: Any = None) -> RawClient:
    assigned = await pool.assigned(keys, devices=wanted_devices(allow))
    client = RawClient(await pool.channel(assigned, keys), assigned, steps)
    client.spec.entitlements.extend(allow)
    return client


async def result_of(client: RawClient) -> node_pb.Result:
    await client.start()
    result = await client.until("result")
    await client.done()
    return result


async def built(pool: NodePool, steps: str, *allow: str) -> RawClient:
    client = await client_of(pool, steps, *allow)
    result = await result_of(client)
    assert result.HasField("success"), result
    return client


async def failure_of(pool: NodePool, steps: str, *allow: str) -> str:
    client = await client_of(pool, steps, *allow)
    result = await result_of(client)
    assert result.HasField("failure"), result
    return str(result.failure.message)


async def refusal_of(pool: NodePool, *allow: str, keys: Any = None) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        client = await client_of(pool, "", *allow, keys=keys)
        await client.start()
        await client.until("result")
    return error_from_rpc(caught.value, peer="the pool", unreachable=UsageError)


@pytest.mark.parametrize("allow", ["device", f"device={GPU}", f"device={KIND}=*"])
async def test_allowed_step_has_the_device_its_variable_and_its_mount(
    pool: NodePool, tmp_path: Path, allow: str
) -> None:
    write_specification(tmp_path / "cdi")
    agent = await pool.start_node(entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    await told(pool, "one", f"{KIND}=0", GPU)
    # A step without the device may not open it, also not by a device node of its own.
    stolen = "RUN mknod /mine c 10 237 && ! ( : < /mine ) && test ! -e /dev/nvidia0\n"
    await built(pool, STEP + stolen, allow)
    await wait_free(agent)


async def test_step_without_the_right_is_refused_and_told_the_flag(
    pool: NodePool, tmp_path: Path
) -> None:
    write_specification(tmp_path / "cdi")
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    message = await failure_of(pool, STEP)
    assert f"device {GPU} is requested by the build but not allowed" in message
    assert f"Give --allow device={GPU}" in message
    # Another device of the kind is no right to this one.
    assert "not allowed" in await failure_of(pool, STEP, f"device={KIND}=0")


async def test_project_that_is_not_permitted_is_refused_before_any_step(
    pool: NodePool, tmp_path: Path
) -> None:
    folder = tmp_path / "cdi"
    # Devices that say that they are for everybody are not for projects without the right.
    write_specification(folder, annotations={"org.mobyproject.buildkit.device.autoallow": "true"})
    await pool.start_node(
        entitlements=["device"], project_entitlements={"default": []}, cdi_spec_dirs=[folder]
    )
    await told(pool, "one", f"{KIND}=0", GPU)
    error = await refusal_of(pool, f"device={GPU}")
    assert isinstance(error, AccessDeniedError) and error.exit_code == 4
    assert "does not permit it to project default" in error.message
    message = await failure_of(pool, STEP)
    assert "device support is disabled" in message
    assert f"The step needs --allow device={GPU}, but node one does not permit it" in message
    await built(pool, OPTIONAL)


async def test_patterns_permit_some_devices_and_not_others(pool: NodePool, tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    write_specification(folder)
    write_specification(folder, "eth0", kind="acme.example/nic")
    await pool.start_node(
        project_entitlements={"default": [f"device={KIND}=*"]}, cdi_spec_dirs=[folder]
    )
    await told(pool, "one", "acme.example/nic=eth0", f"{KIND}=0", GPU)
    await built(pool, STEP, f"device={GPU}")
    for allow in ("device=acme.example/nic=eth0", "device"):
        error = await refusal_of(pool, allow)
        assert isinstance(error, AccessDeniedError)
        assert f"--allow {allow} is refused: node one permits project default only" in error.message
        assert f"device={KIND}=*" in error.message
    message = await failure_of(pool, "RUN --device=acme.example/nic=eth0 true\n", f"device={GPU}")
    assert "acme.example/nic=eth0 is requested by the build but not allowed" in message
    # What a step calls a device is its own affair; what it is, is checked.
    await built(
        pool, STEP.replace(GPU, "acme.example/mine"), f"device={GPU},alias=acme.example/mine"
    )
    error = await refusal_of(pool, f"device=acme.example/nic=eth0,alias={GPU}")
    assert "--allow device=acme.example/nic=eth0 is refused" in error.message


async def test_untrusted_members_get_no_device(pool: NodePool, tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    write_specification(folder, annotations={"org.mobyproject.buildkit.device.autoallow": "true"})
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[folder])
    await told(pool, "one", f"{KIND}=0", GPU)
    token = await pool.gateway.create_token("guest", identity_pb.ROLE_UNTRUSTED)
    keys = await pool.gateway.login(token)
    error = await refusal_of(pool, "device", keys=keys)
    assert isinstance(error, AccessDeniedError) and "untrusted members" in error.message
    client = await client_of(pool, STEP, keys=keys)
    failure = (await result_of(client)).failure.message
    assert "The step needs device, which untrusted members never get." in failure


async def test_optional_device_that_is_missing_is_done_without(
    pool: NodePool, tmp_path: Path
) -> None:
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    await built(pool, OPTIONAL, "device")
    message = await failure_of(pool, STEP, "device")
    assert f'required device "{GPU}" is not registered' in message
    assert f"give --allow device={KIND} to be placed at a node that has one" in message


async def test_builds_go_to_the_node_that_has_the_device(pool: NodePool, tmp_path: Path) -> None:
    write_specification(tmp_path / "cdi")
    options = {"entitlements": ["device"], "slots": 100}
    await pool.start_node("plain", cdi_spec_dirs=[], **options)
    await pool.start_node("gpu", cdi_spec_dirs=[tmp_path / "cdi"], **options)
    await told(pool, "gpu", f"{KIND}=0", GPU)
    await told(pool, "plain")
    for wish in (KIND, GPU, f"{KIND}=*", "*"):
        places = [(await pool.assigned(devices=[wish])).node_id for _ in range(10)]
        assert places == ["gpu"] * 10, wish
    await built(pool, STEP, f"device={GPU}")


async def test_device_that_nobody_has_is_refused_at_once_with_what_there_is(
    pool: NodePool, tmp_path: Path
) -> None:
    write_specification(tmp_path / "cdi", kind="acme.example/npu")
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    await told(pool, "one", "acme.example/npu=0", "acme.example/npu=all")
    await asyncio.sleep(0.2)
    started = time.monotonic()
    error = await refusal_of(pool, f"device={GPU}")
    assert time.monotonic() - started < 1
    assert isinstance(error, DeviceUnavailableError) and error.exit_code == 5
    assert error.message == (
        f"no node of this pool has the device {GPU}; its nodes have acme.example/npu=0 and "
        "acme.example/npu=all"
    )


async def test_specification_that_comes_or_goes_while_the_node_runs_is_heeded(
    pool: NodePool, tmp_path: Path
) -> None:
    folder = tmp_path / "cdi"
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[folder])
    # Its BuildKit runs from here on, with no device and no directory for them.
    await built(pool, OPTIONAL, "device")
    await told(pool, "one")
    path = write_specification(folder, suffix="yaml")
    await told(pool, "one", f"{KIND}=0", GPU)
    await built(pool, STEP, f"device={GPU}")
    path.unlink()
    await told(pool, "one")
    error = await refusal_of(pool, f"device={GPU}")
    assert "its nodes have no devices" in error.message


async def test_broken_specifications_are_named_and_harm_no_others(
    pool: NodePool, tmp_path: Path
) -> None:
    folder = tmp_path / "cdi"
    write_specification(folder)
    (folder / "half.yaml").write_text("kind: [")
    # One that describes the same devices once more.
    twice = write_specification(folder, suffix="yaml")
    with capture_logs() as logs:
        await pool.start_node(entitlements=["device"], cdi_spec_dirs=[folder])
        await told(pool, "one", f"{KIND}=0", GPU)
    events = [line for line in logs if line["event"] == "devices.specification.broken"]
    assert {line["path"] for line in events} == {str(folder / "half.yaml"), str(twice)}, events
    await built(pool, STEP, f"device={GPU}")


async def test_stock_buildx_gets_the_device_where_its_node_has_it(
    pool: NodePool, tmp_path: Path
) -> None:
    write_specification(tmp_path / "cdi")
    await pool.start_node(entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    await told(pool, "one", f"{KIND}=0", GPU)
    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(STEP)
        for allow in ("device", f"device={GPU}"):
            result = await user.build("--allow", allow)
            assert result.code == 0, result.output
        refused = await user.build("--no-cache")
        assert refused.code == 1 and f"Give --allow device={GPU}" in refused.output
        missing = await user.build("--allow", "device=acme.example/npu=0")
        assert missing.code == 1 and missing.seconds < 5
        text = (
            "node one, to which you are connected, has no device acme.example/npu=0; its nodes "
            f"have {KIND}=0 and {GPU}"
        )
        assert text in missing.output


async def test_stock_buildx_at_a_node_without_the_device_is_told_which_has_it(
    pool: NodePool, tmp_path: Path
) -> None:
    write_specification(tmp_path / "cdi")
    # A connection of a project goes to its first node.
    first, second = rank_nodes("default", frozenset(("one", "two")))
    await pool.start_node(first, entitlements=["device"], cdi_spec_dirs=[])
    await pool.start_node(second, entitlements=["device"], cdi_spec_dirs=[tmp_path / "cdi"])
    await told(pool, first)
    await told(pool, second, f"{KIND}=0", GPU)
    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(STEP)
        result = await user.build("--allow", f"device={GPU}")
        assert result.code == 1 and result.seconds < 5
        text = (
            f"node {first}, to which you are connected, has no device {GPU}; node {second} has it"
        )
        assert text in result.output
