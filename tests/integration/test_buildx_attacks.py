"""What members who mean harm can do to others through BuildKit's API, in raw calls."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack

import pytest
import structlog

from offload_builder.buildkit.h2.messages import (
    MAX_MESSAGE,
    RESOURCE_EXHAUSTED,
    GrpcError,
    message_prefix,
)
from offload_builder.buildkit.h2.stream import StreamResetError
from offload_builder.node.proxy import server
from offload_core.versions import call_metadata
from offload_proto.buildkit import control_pb2 as control
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.buildx import Buildx, finished, until_output
from tests.fixtures.node import NodePool
from tests.fixtures.rawbuildkit import BRIDGE, BUILD_ID, CONTROL, RawBuildkit


@contextlib.asynccontextmanager
async def serving(**options):
    """A pool, its user, and another member of the same project with a raw connection."""
    async with NodePool() as pool:
        agent = await pool.start_node(slots=4, **options)
        token = await pool.gateway.create_token("mallory", identity_pb.ROLE_MEMBER, "default")
        keys = await pool.gateway.login(token)
        async with (
            Buildx(pool.gateway.address, pool.keys) as user,
            RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, keys) as mallory,
        ):
            yield pool, agent, user, mallory


async def running_ref(mallory):
    """Return the name of the build that runs, as BuildKit's history tells every member."""
    request = control.BuildHistoryRequest(EarlyExit=True).SerializeToString()
    async with asyncio.timeout(20):
        while True:
            for message in await mallory.ask(f"{CONTROL}ListenBuildHistory", request):
                if ref := control.BuildHistoryEvent.FromString(message).record.Ref:
                    return ref
            await asyncio.sleep(0.1)


async def test_nobody_takes_part_in_a_build_of_another_client():
    async with serving() as (_pool, _agent, user, mallory):
        (user.context / "token").write_text("s3cr3t-value")
        user.dockerfile("RUN --mount=type=secret,id=token sleep 8\n")
        build = await user.start(
            "build", "--progress", "plain", "--secret", "id=token,src=token", "."
        )
        await until_output(build, "sleep 8")
        ref = await running_ref(mallory)
        # The daemon would refuse the name, but only after calls for it were let through.
        order = control.SolveRequest(Ref=ref, Session="none").SerializeToString()
        solving = asyncio.ensure_future(mallory.ask(f"{CONTROL}Solve", order))
        joined = []
        while not solving.done():
            with contextlib.suppress(GrpcError):
                joined += await mallory.ask(f"{BRIDGE}Inputs", b"", [(BUILD_ID, ref)])
                break
        with pytest.raises(GrpcError) as refused:
            await solving
        assert not joined
        assert refused.value.code == 6
        assert (await finished(build)).code == 0


async def test_a_name_of_a_build_before_is_not_taken_over():
    async with serving() as (_pool, _agent, user, mallory):
        assert (await user.build()).code == 0
        ref = await running_ref(mallory)
        order = control.SolveRequest(Ref=ref, Session="none", Frontend="dockerfile.v0")
        with pytest.raises(GrpcError):
            await mallory.ask(f"{CONTROL}Solve", order.SerializeToString())
        removal = control.UpdateBuildHistoryRequest(Ref=ref, Delete=True).SerializeToString()
        with pytest.raises(GrpcError, match="only an administrator"):
            await mallory.ask(f"{CONTROL}UpdateBuildHistory", removal)
        assert ref in await user.ok("history", "ls", "--no-trunc", "--format", "{{.Ref}}")


async def test_nor_is_it_after_the_node_has_started_again():
    async with serving() as (pool, _agent, user, mallory):
        assert (await user.build()).code == 0
        ref = await running_ref(mallory)
        await pool.stop_node()
        await pool.start_node()
        order = control.SolveRequest(Ref=ref, Session="none", Frontend="dockerfile.v0")
        token = await pool.gateway.create_token("eve", identity_pb.ROLE_MEMBER, "default")
        keys = await pool.gateway.login(token)
        async with RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, keys) as eve:
            with pytest.raises(GrpcError, match="already"):
                await eve.ask(f"{CONTROL}Solve", order.SerializeToString())


async def test_a_member_unpins_no_record_of_another():
    async with serving() as (_pool, _agent, user, mallory):
        assert (await user.build()).code == 0
        ref = await running_ref(mallory)
        change = control.UpdateBuildHistoryRequest(Ref=ref).SerializeToString()
        with pytest.raises(GrpcError, match="only an administrator"):
            await mallory.ask(f"{CONTROL}UpdateBuildHistory", change)


async def test_unfinished_requests_fill_no_memory():
    async with serving() as (_pool, _agent, _user, mallory):
        half = message_prefix(MAX_MESSAGE) + bytes(MAX_MESSAGE - 1)

        async def begin():
            async with mallory.call(f"{CONTROL}DiskUsage") as call:
                with contextlib.suppress(StreamResetError):
                    await call._stream.write([half])
                await call.receive()

        async with asyncio.timeout(40):
            calls = [asyncio.ensure_future(begin()) for _ in range(6)]
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            assert {task.exception().code for task in done} == {RESOURCE_EXHAUSTED}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert await mallory.ask(f"{CONTROL}DiskUsage")


async def test_strangers_take_few_connections_and_keep_none(monkeypatch):
    monkeypatch.setattr(server, "MAX_STRANGERS", 3)
    monkeypatch.setattr(server, "STRANGER_SECONDS", 1.5)
    async with serving() as (pool, _agent, user, mallory), AsyncExitStack() as stack:
        strangers = [
            await stack.enter_async_context(RawBuildkit(pool.gateway.address, pool.gateway.ca_pem))
            for _ in range(5)
        ]
        with pytest.raises(GrpcError, match="run: offload login"):
            await strangers[0].ask(f"{CONTROL}DiskUsage")
        assert await mallory.ask(f"{CONTROL}DiskUsage")
        assert sum(stranger.http2.usable for stranger in strangers) == 3
        # What one sends without an end is not kept either.
        with pytest.raises(GrpcError):
            await strangers[1].ask("/grpc.health.v1.Health/Check", bytes(1 << 20))
        await asyncio.sleep(2)
        assert not any(stranger.http2.usable for stranger in strangers)
        assert (await user.build()).code == 0


async def test_one_token_leaves_connections_to_others(monkeypatch):
    monkeypatch.setattr(server, "MAX_OF_ONE", 3)
    async with serving() as (pool, _agent, user, mallory), AsyncExitStack() as stack:
        more = [RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, mallory.keys)]
        more += [RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, mallory.keys)]
        more += [RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, mallory.keys)]
        for connection in more:
            await stack.enter_async_context(connection)
        await asyncio.sleep(0.3)
        assert [item.http2.usable for item in more] == [True, True, False]
        assert (await user.build()).code == 0


async def test_the_name_of_a_program_steers_no_terminal():
    async with serving() as (pool, _agent, _user, mallory):
        order = control.SolveRequest(Ref="a" * 25, Session="none", Frontend="dockerfile.v0")
        program = ("user-agent", "evil\x1b[2J/1.0")
        with pytest.raises(GrpcError):
            await mallory.ask(f"{CONTROL}Solve", order.SerializeToString(), [program])
        stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
        reply = await stub.List(builds_pb.ListRequest(), metadata=call_metadata(), timeout=20)
        assert [build.client for build in reply.builds] == ["evil\N{REPLACEMENT CHARACTER}[2j"]


async def test_nobody_uses_the_session_of_another_client():
    async with serving() as (pool, _agent, _user, mallory):
        named = [("x-docker-expose-session-uuid", "s" * 25)]
        async with RawBuildkit(pool.gateway.address, pool.gateway.ca_pem, pool.keys) as other:
            async with other.call(f"{CONTROL}Session", named) as session:
                # The greeting of the node: the session is there.
                assert await session.receive()
                order = control.SolveRequest(Ref="r" * 25, Session="s" * 25)
                directory = control.SolveRequest(Ref="r" * 25, Session="n" * 25)
                directory.FrontendAttrs["local-sessionid:context"] = "context:" + "s" * 25
                for call in (
                    mallory.ask(f"{CONTROL}Solve", directory.SerializeToString()),
                    mallory.ask(f"{CONTROL}Solve", order.SerializeToString()),
                    mallory.ask(f"{CONTROL}Session", b"", named),
                ):
                    with pytest.raises(GrpcError) as refused:
                        await call
                    assert refused.value.code == 6
            await asyncio.sleep(0.2)
            async with mallory.call(f"{CONTROL}Session", named) as session:
                assert await session.receive()


async def test_nothing_lists_the_digests_of_what_others_have_built():
    async with serving() as (_pool, _agent, user, mallory):
        assert (await user.build()).code == 0
        with pytest.raises(GrpcError, match="not offered"):
            await mallory.ask("/containerd.services.content.v1.Content/List")
        # What stock buildx reads needs no list.
        ref = await running_ref(mallory)
        await user.ok("history", "inspect", ref)
        await user.ok("history", "export", "-o", "record.dockerbuild", ref)
        assert (user.context / "record.dockerbuild").stat().st_size


async def test_calls_that_are_refused_ask_the_gateway_seldom():
    async with serving() as (pool, _agent, _user, mallory):
        await pool.gateway.create_project("other")
        address, ca_pem = pool.gateway.address, pool.gateway.ca_pem
        async with RawBuildkit(address, ca_pem, mallory.keys, "other") as raw:
            with structlog.testing.capture_logs() as events:
                for _ in range(3):
                    calls = [raw.ask(f"{CONTROL}DiskUsage") for _ in range(50)]
                    found = await asyncio.gather(*calls, return_exceptions=True)
                    assert {error.code for error in found} == {7}
        refused = [event for event in events if event["event"] == "buildkit.access.refused"]
        assert 1 <= len(refused) <= 3
