"""A build is the node's: clients get lost, leave, come back and take over."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from offload_builder.node import services
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.node import NodePool, RawClient, wait_free
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SLOW = "COPY extra /extra\nRUN echo begun; sleep 1.5; echo ended\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_of(pool: NodePool, steps: str = SLOW, image: bool = True) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    client.files["extra"] = (b"%f" % time.time() * 1000, 0o100644)
    if image:
        client.spec.outputs.add(type=Output.TYPE_IMAGE)
    return client


def sequences(client: RawClient) -> list[int]:
    return [m.progress.sequence for m in client.seen if m.HasField("progress")]


def printed(client: RawClient) -> bytes:
    return b"".join(entry.data for m in client.seen for entry in m.progress.logs)


def independence(client: RawClient) -> list[tuple[bool, str]]:
    said = [m.independence for m in client.seen if m.HasField("independence")]
    return [(item.independent, item.needs) for item in said]


async def in_step(client: RawClient) -> None:
    await client.start()
    await client.until_text(b"begun")


async def test_build_says_when_it_needs_its_client_no_more(pool):
    await pool.start_node()
    client = await client_of(pool)
    await in_step(client)
    assert independence(client) == [(False, "the build context"), (True, "")]
    await client.until("result")
    await client.done()


async def test_lost_client_does_not_end_an_independent_build_and_misses_nothing(pool):
    agent = await pool.start_node(ended_keep=60.0)
    client = await client_of(pool)
    await in_step(client)
    seen = sequences(client)
    client.vanish()
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
    await client.rejoin(after=seen[-1])
    result = await client.until("result")
    assert result.success.image.digest
    assert sequences(client) == list(range(1, len(sequences(client)) + 1))
    assert printed(client).count(b"begun") == printed(client).count(b"ended") == 1
    await client.done()
    assert agent.ended.find(client.assigned.build_id) is not None


async def test_client_that_the_build_needs_comes_back_before_the_context_is_complete(pool):
    agent = await pool.start_node(rejoin_wait=20.0)
    client = await client_of(pool)
    await client.start()
    await client.until("need_blobs")
    client.vanish()
    await asyncio.sleep(0.3)
    assert client.assigned.build_id in agent.slots.builds
    await client.rejoin(after=(sequences(client) or [0])[-1])
    result = await client.until("result")
    assert result.HasField("success"), result
    assert sequences(client) == list(range(1, len(sequences(client)) + 1))
    await client.done()
    await wait_free(agent)


async def test_new_process_lists_again_and_the_build_goes_on(pool):
    agent = await pool.start_node(rejoin_wait=20.0)
    first = await client_of(pool)
    await first.start()
    await first.until("context_request")
    first.vanish()
    second = RawClient(await pool.channel(first.assigned), first.assigned)
    second.files = first.files
    await second.rejoin()
    result = await second.until("result")
    assert result.HasField("success"), result
    assert sequences(second)[0] == 1
    await second.done()
    await wait_free(agent)


async def test_context_that_changed_while_the_client_was_away_fails_the_build(pool):
    await pool.start_node(rejoin_wait=20.0)
    client = await client_of(pool)
    await client.start()
    await client.until("need_pages")
    client.vanish()
    client.files["extra"] = (b"something else", 0o100644)
    await client.rejoin()
    result = await client.until("result")
    assert result.failure.kind == node_pb.Failure.KIND_CONTEXT_CHANGED, result
    assert "changed while its client was away" in result.failure.message
    # The node ends the call of whom it refused.
    async for _ in client.messages():
        pass


async def test_build_that_needs_its_client_is_cancelled_when_nobody_comes_back(pool):
    agent = await pool.start_node(rejoin_wait=0.3)
    client = await client_of(pool)
    await client.start()
    await client.until("need_blobs")
    client.vanish()
    await wait_free(agent)
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_CANCELED)
    assert "the client went away" in (await pool.build(client.assigned.build_id)).error


async def test_streamed_output_keeps_the_build_dependent_and_is_announced_again(pool):
    agent = await pool.start_node(rejoin_wait=20.0)
    client = await client_of(pool, image=False)
    client.spec.outputs.add(type=Output.TYPE_TAR)
    await client.start()
    await client.until("output_ready")
    assert independence(client)[-1] == (False, "the output of type tar")
    client.vanish()
    await client.rejoin()
    ready = await client.until("output_ready")
    request = node_pb.ReadOutputRequest(output_index=ready.output_index)
    call = client.blobs.ReadOutput(request, metadata=client.metadata)
    assert b"busybox" in b"".join([message.data async for message in call])
    assert (await client.until("result")).HasField("success")
    await client.done()
    await wait_free(agent)


async def test_user_leaves_only_when_the_build_goes_on_without(pool):
    agent = await pool.start_node(ended_keep=60.0)
    client = await client_of(pool)
    await client.start()
    await client.until("context_request")
    await client.send(leave=node_pb.Leave())
    assert not (await client.until("independence")).independent
    await client.list(1)
    await client.until_text(b"begun")
    await client.send(leave=node_pb.Leave())
    async for message in client.messages():
        assert not message.HasField("result")
    assert await client.call.code() is grpc.StatusCode.OK
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
    assert agent.ended.find(client.assigned.build_id) is not None


async def test_second_client_takes_over_and_a_viewer_only_looks_on(pool):
    agent = await pool.start_node()
    first = await client_of(pool)
    await in_step(first)
    channel = await pool.channel(first.assigned)
    viewer = RawClient(channel, first.assigned)
    await viewer.rejoin(view_only=True)
    await viewer.until_text(b"begun")
    second = RawClient(channel, first.assigned)
    await second.rejoin()
    with pytest.raises(grpc.RpcError, match="another client") as caught:
        await first.until("result")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await second.until("result")).HasField("success")
    assert (await viewer.until("result")).HasField("success")
    await second.done()
    await viewer.done()
    await wait_free(agent)


async def test_number_of_viewers_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(services, "MAX_VISITS", 2)
    agent = await pool.start_node()
    client = await client_of(pool)
    await in_step(client)
    viewer = RawClient(await pool.channel(client.assigned), client.assigned)
    await viewer.rejoin(view_only=True)
    await viewer.until("independence")
    other = RawClient(await pool.channel(client.assigned), client.assigned)
    await other.rejoin(view_only=True)
    with pytest.raises(grpc.RpcError, match="look at this build") as caught:
        await other.until("result")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # Who takes the build over is always let in.
    again = RawClient(await pool.channel(client.assigned), client.assigned)
    await again.rejoin()
    await again.until("independence")
    viewer.vanish()
    agent.cancel(client.assigned.build_id, "enough")
    await again.until("result")
    await again.done()
    await wait_free(agent)


async def test_viewer_cannot_cancel(pool):
    agent = await pool.start_node()
    first = await client_of(pool)
    await in_step(first)
    viewer = RawClient(await pool.channel(first.assigned), first.assigned)
    await viewer.rejoin(view_only=True)
    await viewer.send(cancel=node_pb.CancelRun())
    with pytest.raises(grpc.RpcError, match="only looks on"):
        await viewer.until("result")
    assert (await first.until("result")).HasField("success")
    await first.done()
    await wait_free(agent)


async def test_other_members_do_not_find_the_build_and_admins_only_look_on(pool):
    await pool.start_node()
    client = await client_of(pool)
    await in_step(client)

    async def other(role: Any, name: str, *, view_only: bool) -> Any:
        token = await pool.gateway.create_token(name, role)
        keys = await pool.gateway.login(token)
        found = RawClient(await pool.channel(client.assigned, keys), client.assigned)
        await found.rejoin(view_only=view_only)
        result = await found.until("result")
        await found.done()
        return result

    for view_only in (False, True):
        with pytest.raises(grpc.RpcError, match="there is no build") as caught:
            await other(identity_pb.ROLE_MEMBER, f"eve{view_only}", view_only=view_only)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError, match="there is no build"):
        await other(identity_pb.ROLE_ADMIN, "root1", view_only=False)
    result = await other(identity_pb.ROLE_ADMIN, "root2", view_only=True)
    assert result.HasField("success")
    await client.until("result")
    await client.done()


async def test_record_goes_after_its_time_and_its_number(pool):
    agent = await pool.start_node(ended_keep=60.0, ended_keep_builds=1)
    first = await client_of(pool, "RUN echo 1\n")
    await first.start()
    await first.until("result")
    await first.done()
    second = await client_of(pool, "RUN echo 2\n")
    await second.start()
    result = await second.until("result")
    await second.done()
    async with asyncio.timeout(10):
        while agent.ended.find(first.assigned.build_id) is not None:
            await asyncio.sleep(0.05)
    await first.rejoin()
    with pytest.raises(grpc.RpcError, match="ended too long ago"):
        await first.until("result")
    # The other one is there with its image.
    request = node_pb.DownloadRequest(digest=result.success.image.digest)
    call = second.blobs.Download(request, metadata=second.metadata)
    assert b"".join([message.data async for message in call])
    object.__setattr__(agent.config, "ended_keep", 0.0)
    agent.ended._keep_seconds = 0.0
    agent._ends.sweep()
    await wait_free(agent)


async def test_kept_build_is_there_after_a_restart_of_its_node(pool):
    await pool.start_node(ended_keep=60.0)
    client = await client_of(pool)
    await client.start()
    result = await client.until("result")
    await client.done()
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
    await pool.stop_node()
    agent = await pool.start_node(ended_keep=60.0)
    where = await located(pool, client.assigned.build_id)
    assert where.server_name == client.assigned.server_name
    client.assigned.endpoints[:] = where.endpoints
    before, client.seen = client.seen, []
    await client.rejoin(await pool.channel(client.assigned))
    again = await client.until("result")
    assert again.success.image == result.success.image
    told = [m.progress for m in client.seen if m.HasField("progress")]
    assert told == [m.progress for m in before if m.HasField("progress")]
    request = node_pb.DownloadRequest(digest=result.success.image.digest)
    call = client.blobs.Download(request, metadata=client.metadata)
    assert b"".join([message.data async for message in call])
    await client.done()
    agent.ended._keep_seconds = 0.0
    agent._ends.sweep()
    await wait_free(agent)


async def located(pool: NodePool, build_id: str) -> builds_pb.LocateResponse:
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    request = builds_pb.LocateRequest(build_id=build_id)
    return await stub.Locate(request, metadata=call_metadata(), timeout=10)


async def test_gateway_says_where_a_build_is_and_when_its_node_is_away(pool):
    await pool.start_node()
    client = await client_of(pool, "RUN echo 1\n")
    await client.start()
    await client.until("result")
    found = await located(pool, client.assigned.build_id[:6])
    assert list(found.endpoints) == list(client.assigned.endpoints)
    assert found.build.build_id == client.assigned.build_id
    await client.done()
    await pool.stop_node()
    async with asyncio.timeout(10):
        while (await located(pool, client.assigned.build_id)).endpoints:
            await asyncio.sleep(0.05)


async def test_save_makes_an_image_also_where_no_output_asks_for_one(pool):
    await pool.start_node(ended_keep=60.0)
    client = await client_of(pool, "RUN echo 1\n", image=False)
    client.spec.save_image = True
    await client.start()
    result = await client.until("result")
    assert result.success.image.digest
    notices = [m.notice.text for m in client.seen if m.HasField("notice")]
    assert len(notices) == 1
    assert "no shared store" in notices[0]
    await client.done()


async def test_login_for_a_push_is_asked_for_before_the_client_may_leave(pool, tmp_path):
    await pool.start_node()
    client = await client_of(pool, image=False)
    with DockerRegistry(tmp_path) as registry:
        client.spec.tags.append(f"{registry.address}/app:one")
        client.spec.outputs.add(type=Output.TYPE_REGISTRY)
        await client.start()
        asked = await client.until("credentials_request")
        assert asked.host == registry.address
        assert independence(client)[-1] == (False, "the build context and the registry logins")
        reply = node_pb.CredentialsReply(
            request_id=asked.request_id, username=USER, secret=PASSWORD
        )
        await client.send(credentials_reply=reply)
        await client.until_text(b"begun")
        client.vanish()
        await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
        # An index, as the provenance comes with it.
        assert registry.get("/v2/app/manifests/one")["manifests"]
