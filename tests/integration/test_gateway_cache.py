"""CacheService over real sockets: who may do what, and nodes that answer, fail or are silent."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from offload_builder.gateway import cachework
from offload_builder.gateway.projectbounds import BoundsTable
from offload_builder.gateway.store import Store, default_url
from offload_core.errors import (
    AccessDeniedError,
    CacheUnavailableError,
    GatewayUnreachableError,
    NodeLostError,
    NotFoundError,
    UsageError,
)
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import cache_service_pb2 as cache_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.cache_service_pb2_grpc import CacheServiceStub
from tests.fixtures.gateway import RunningGateway
from tests.integration.attachednode import AttachedNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RPC_SECONDS = 30.0


class CacheClient:
    """Calls CacheService as one member."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def call(self, method: str, **values: Any) -> Any:
        """Await a call; errors are ours."""
        request = getattr(cache_pb, f"{method}Request")(**values)
        try:
            return await getattr(self._stub, method)(
                request, timeout=RPC_SECONDS, metadata=call_metadata()
            )
        except grpc.RpcError as error:
            raise error_from_rpc(
                error, peer="the gateway", unreachable=GatewayUnreachableError
            ) from None

    async def prune(self, scope: str = "", **values: Any) -> Any:
        wanted = cache_pb.PruneFilter(scope=scope, all_scopes=not scope)
        return await self.call("Prune", project_id="default", filter=wanted, **values)


async def client(
    gateway: RunningGateway, name: str = "", role: identity_pb.Role.ValueType = 0, *projects: str
) -> CacheClient:
    token = await gateway.create_token(name, role, *projects) if name else ""
    return CacheClient(CacheServiceStub(await gateway.channel(await gateway.login(token))))


@asynccontextmanager
async def pool(*names: str, **options: Any) -> AsyncIterator[tuple[RunningGateway, list[Any]]]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(RunningGateway(**options))
        nodes = [
            await stack.enter_async_context(
                AttachedNode(gateway, name, await gateway.enroll_node(name))
            )
            for name in names
        ]
        yield gateway, nodes


def pruned(task: nodes_pb.CacheTask) -> nodes_pb.CacheTaskReply:
    entry = cache_pb.PrunedEntry(scope=task.prune.filter.scope or "main", entry_id="e")
    return nodes_pb.CacheTaskReply(prune=cache_pb.PruneResult(entries=[entry], freed_bytes=3))


def used(task: nodes_pb.CacheTask) -> nodes_pb.CacheTaskReply:
    usage = cache_pb.CacheUsage(shared_bytes=0 if task.usage.node_only else 10)
    usage.nodes.add(node_id="n")
    if not task.usage.node_only:
        usage.scopes.add(scope="feature%2Fx", entries=1)
    return nodes_pb.CacheTaskReply(usage=usage)


async def test_one_node_answers_for_the_shared_store_and_all_for_themselves():
    async with pool("one", "two") as (gateway, nodes):
        for node in nodes:
            node.answer = used
        (project,) = (await (await client(gateway)).call("Usage")).projects
        assert (project.project_id, project.usage.shared_bytes) == ("default", 10)
        assert [scope.scope for scope in project.usage.scopes] == ["feature/x"]
        assert len(project.usage.nodes) == 2
        assert not project.silent_node_ids
        assert [node.tasks[0].usage.node_only for node in nodes] == [False, True]


async def test_silent_node_is_named_and_the_next_one_asked_in_full(monkeypatch):
    monkeypatch.setattr(cachework, "USAGE_SECONDS", 0.3)
    async with pool("one", "two") as (gateway, nodes):
        nodes[1].answer = used
        (project,) = (await (await client(gateway)).call("Usage", project_id="default")).projects
        assert list(project.silent_node_ids) == ["one"]
        assert project.usage.shared_bytes == 10


async def test_node_that_leaves_ends_the_wait_for_it():
    async with pool("one") as (gateway, nodes):
        member = await client(gateway)
        asking = asyncio.create_task(member.prune("main"))
        await nodes[0].eventually(lambda: nodes[0].tasks)
        nodes[0].vanish()
        with pytest.raises(NodeLostError):
            await asking
        (project,) = (await member.call("Usage")).projects
        assert project.usage.shared_problem


async def test_error_of_the_node_reaches_the_member():
    async with pool("one") as (gateway, nodes):
        nodes[0].answer = lambda _: nodes_pb.CacheTaskReply(
            error="the bucket is away", error_reason="CACHE_UNAVAILABLE"
        )
        with pytest.raises(CacheUnavailableError, match="the bucket is away"):
            await (await client(gateway)).prune("main")


async def test_members_prune_what_they_may_write_and_nothing_else():
    async with pool("one", protected_branches=("release-*",)) as (gateway, nodes):
        nodes[0].answer = pruned
        ann = await client(gateway, "ann", identity_pb.ROLE_MEMBER)
        eve = await client(gateway, "eve", identity_pb.ROLE_UNTRUSTED)
        pipeline = await client(gateway, "ci", identity_pb.ROLE_CI)
        reply = await ann.prune("feature/x", dry_run=True)
        assert [entry.scope for entry in reply.result.entries] == ["feature/x"]
        assert nodes[0].tasks[-1].prune.filter.scope == "feature%2Fx"
        assert nodes[0].tasks[-1].prune.dry_run
        await pipeline.prune("release-1")
        await eve.prune("~untrusted-eve")
        await (await client(gateway)).prune()
        asked = len(nodes[0].tasks)
        for who, scope in (
            (ann, "release-1"),
            (ann, "~untrusted-eve"),
            (ann, ""),
            (eve, "main"),
            (eve, "~untrusted-ann"),
            (pipeline, ""),
        ):
            with pytest.raises(AccessDeniedError):
                await who.prune(scope)
        assert len(nodes[0].tasks) == asked


async def test_filters_that_say_nothing_or_two_things_are_refused():
    async with pool() as (gateway, _):
        admin = await client(gateway)
        for wanted in (
            cache_pb.PruneFilter(),
            cache_pb.PruneFilter(keep_bytes=5),
            cache_pb.PruneFilter(scope="main", all_scopes=True),
            cache_pb.PruneFilter(scope="main", keep_bytes=-1),
        ):
            with pytest.raises(UsageError):
                await admin.call("Prune", project_id="default", filter=wanted)


async def test_projects_of_others_are_not_seen():
    async with pool("one") as (gateway, nodes):
        nodes[0].answer = used
        await gateway.create_project("secret")
        ann = await client(gateway, "ann", identity_pb.ROLE_MEMBER, "default")
        assert [p.project_id for p in (await ann.call("Usage")).projects] == ["default"]
        for method in ("Usage", "Prune", "Promote"):
            with pytest.raises(AccessDeniedError):
                await ann.call(method, project_id="secret")
        with pytest.raises(NotFoundError):
            await ann.call("Why", build_id="aaaa")


async def test_promotion_is_for_administrators_and_pipelines():
    async with pool("one", default_branches=("trunk",)) as (gateway, nodes):
        nodes[0].answer = lambda _: nodes_pb.CacheTaskReply(
            promote=cache_pb.PromoteResult(entries=2, refused=1)
        )
        pipeline = await client(gateway, "ci", identity_pb.ROLE_CI)
        reply = await pipeline.call("Promote", project_id="default", from_scope="a/b")
        assert (reply.result.entries, reply.result.refused) == (2, 1)
        task = nodes[0].tasks[-1].promote
        assert (task.from_scope, task.to_scope) == ("a%2Fb", "trunk")
        assert (task.member, task.role) == ("ci", "ci")
        ann = await client(gateway, "ann", identity_pb.ROLE_MEMBER)
        with pytest.raises(AccessDeniedError):
            await ann.call("Promote", project_id="default", from_scope="a/b")


async def test_gain_and_why_come_from_the_history():
    async with pool("one") as (gateway, nodes):
        (node,) = nodes
        node.answer = used
        builds = BuildsServiceStub(await gateway.channel(await gateway.login()))
        ids = []
        for cached in (False, True):
            request = builds_pb.CreateRequest(request_id=uuid.uuid4().hex, project_id="default")
            stream = builds.Create(request, timeout=30, metadata=call_metadata())
            while not (update := await stream.read()).HasField("assigned"):
                pass
            ids.append(update.assigned.build_id)
            node.update(
                ids[-1],
                builds_pb.BUILD_STATE_SUCCEEDED,
                stats=builds_pb.BuildStats(steps_total=4, steps_cached=3 if cached else 0),
                steps=[nodes_pb.StepTime(key="k", milliseconds=1500, cached=cached)],
            )
        member = await client(gateway)
        gain = cache_pb.CacheGain()
        while gain.builds < 2:
            gain = (await member.call("Usage")).projects[0].gain
        assert (gain.steps_total, gain.steps_cached) == (8, 3)
        assert gain.saved.ToMilliseconds() == 1500
        node.answer = lambda task: nodes_pb.CacheTaskReply(
            why=cache_pb.WhyResult(build_id=task.why.build_id)
        )
        reply = await member.call("Why", build_id=ids[1][:6], step="RUN x")
        assert reply.result.build_id == ids[1]
        task = node.tasks[-1].why
        assert (list(task.earlier_build_ids), task.step) == ([ids[0]], "RUN x")


async def test_bounds_reach_nodes_when_they_attach_and_when_another_process_changes_them():
    async with pool("one") as (gateway, nodes):
        await nodes[0].eventually(lambda: nodes[0].limits)
        assert not nodes[0].limits[0].projects
        async with Store(default_url(gateway.directory)) as store:
            await BoundsTable(store).change("default", shared_keep_bytes=100)
        await nodes[0].eventually(lambda: len(nodes[0].limits) > 1)
        (limit,) = nodes[0].limits[1].projects
        assert (limit.project_id, limit.shared_keep_bytes) == ("default", 100)
        async with AttachedNode(gateway, "two", await gateway.enroll_node("two")) as late:
            await late.eventually(lambda: late.limits)
            assert late.limits[0] == nodes[0].limits[1]
