"""What members see of nodes."""

from __future__ import annotations

from datetime import UTC, datetime

from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.tokens import TokenRecord
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb


async def test_what_a_node_says_of_itself_steers_no_terminal():
    nodes, odd = NodeRegistry(1.0, 1.0), "\x1b]0;owned\x07\n" + "x" * 5000
    token = TokenRecord("t", "", "one", identity_pb.ROLE_NODE, (), datetime.now(UTC))
    hello = nodes_pb.Hello(version=odd, buildkit_version=odd, platforms=[odd])
    nodes.heard(nodes.attach("one", token, hello), nodes_pb.Heartbeat(health=odd))
    (info,) = nodes.infos()
    said = (info.health, info.version, info.buildkit_version, *info.platforms)
    assert len(said) == 4
    assert all(text.isprintable() and len(text) <= 300 for text in said)
