"""One answer from those of several nodes."""

from __future__ import annotations

from offload_builder.gateway.cachework import merge_pruned, merge_usage
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
