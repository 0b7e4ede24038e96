"""One answer from those of several nodes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from offload_builder.gateway import cachework
from offload_builder.gateway.cachework import CacheWork, merge_pruned, merge_usage
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.tokens import TokenRecord
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.cache_service_pb2 import (
    CacheUsage,
    NodeUsage,
    PrunedEntry,
    PruneResult,
    ScopeUsage,
)


def scope(name: str, layer_bytes: int, written: int, member: str) -> ScopeUsage:
    usage = ScopeUsage(scope=name, entries=1, layer_bytes=layer_bytes, member=member)
    usage.written_at.FromSeconds(written)
    return usage


def test_numbers_of_the_shared_store_are_those_of_the_first_answer():
    full = CacheUsage(
        shared_bytes=10, nodes=[NodeUsage(node_id="b")], scopes=[scope("m", 5, 1, "")]
    )
    merged = merge_usage([full, CacheUsage(nodes=[NodeUsage(node_id="a")])])
    assert merged.shared_bytes == 10
    assert [node.node_id for node in merged.nodes] == ["a", "b"]
    assert [item.scope for item in merged.scopes] == ["m"]


def test_scopes_of_nodes_without_a_shared_store_are_added_up():
    one = CacheUsage(scopes=[scope("main", 5, 10, "ann"), scope("a%2Fb", 1, 1, "ann")])
    two = CacheUsage(scopes=[scope("main", 3, 20, "bob")])
    main, branch = merge_usage([one, two]).scopes
    assert (main.entries, main.layer_bytes, main.member) == (2, 8, "bob")
    assert branch.scope == "a/b"


def test_entry_that_two_nodes_name_went_once():
    same = PrunedEntry(scope="a%2Fb", entry_id="1")
    other = PrunedEntry(scope="~team", entry_id="1")
    merged = merge_pruned(
        [PruneResult(entries=[same], freed_bytes=4), PruneResult(entries=[other, same])]
    )
    assert [(item.scope, item.entry_id) for item in merged.entries] == [
        ("a/b", "1"),
        ("~team", "1"),
    ]
    assert merged.freed_bytes == 4


async def answer(node, log):
    """Answer for a node as long as it is connected."""
    while messages := await node.connection.take():
        for message in messages:
            task = message.cache_task
            log.append(task.project_id)
            usage = CacheUsage(nodes=[NodeUsage(node_id=node.node_id)])
            node.take_reply(nodes_pb.CacheTaskReply(task_id=task.task_id, usage=usage))


async def test_a_node_that_hangs_is_waited_for_once_for_all_projects(monkeypatch):
    monkeypatch.setattr(cachework, "USAGE_SECONDS", 0.2)
    token = TokenRecord("t", "", "nodes", identity_pb.ROLE_NODE, (), datetime.now(UTC))
    nodes = NodeRegistry(heartbeat_interval=2.0, reconnect_grace=10.0)
    nodes.attach("a-hangs", token, nodes_pb.Hello())
    log: list[str] = []
    answering = asyncio.ensure_future(answer(nodes.attach("b", token, nodes_pb.Hello()), log))
    work, hung = CacheWork(nodes), set()
    began = asyncio.get_running_loop().time()
    for number in range(20):
        usage, silent = await work.usage(f"p{number}", hung)
        assert silent == ("a-hangs",)
        assert [node.node_id for node in usage.nodes] == ["b"]
        assert not usage.shared_problem
    assert asyncio.get_running_loop().time() - began < 2.0
    assert len(log) == 20
    nodes.close()
    answering.cancel()
    await asyncio.wait((answering,))
