"""What commands beside the gateway know of nodes and of builds that are over."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_builder.gateway.egresslearning import EgressLearning
from offload_builder.gateway.egressnodes import STALE_SECONDS, EgressNodes, NodePolicies
from offload_builder.gateway.log_book import LogBook
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.store import Store
from offload_builder.gateway.tokens import TokenRecord
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.events_pb2 import EgressUse, ProgressBatch


@pytest.fixture
async def store(tmp_path):
    async with Store(f"sqlite:///{tmp_path / 'g.sqlite'}") as one:
        yield one


def token(name: str) -> TokenRecord:
    return TokenRecord(
        token_id=name, name=name, role=identity_pb.ROLE_NODE, project_ids=(),
        created_at=datetime.now(UTC), secret_hash="x",
    )  # fmt: skip


async def begun(listed: EgressNodes) -> None:
    async with asyncio.timeout(5):
        while await listed.read() is None:
            await asyncio.sleep(0.02)


def test_why_a_version_is_not_in_force_is_a_sentence():
    node = NodePolicies("one", {"": 3})
    assert node.why_not("", 3) == ""
    assert node.why_not("", 4) == "it has version 3 still"
    assert node.why_not("shop", 1) == "it has none yet"
    assert node.why_not("shop", 0) == ""
    assert NodePolicies("two", {}, "it cannot").why_not("", 1) == "it cannot"


async def test_the_list_follows_the_heartbeats_and_a_wait_ends_with_them(store):
    listed, nodes = EgressNodes(store), NodeRegistry(1.0, 1.0)
    assert await listed.read() is None
    keeping = asyncio.create_task(listed.keep(nodes))
    try:
        node = nodes.attach("one", token("one"), nodes_pb.Hello())
        nodes.heard(node, nodes_pb.Heartbeat(egress_versions={"": 1}))
        await begun(listed)
        assert await listed.wait("", 1, 5.0) == [NodePolicies("one", {"": 1})]
        began = time.monotonic()
        waiting = asyncio.create_task(listed.wait("", 2, 10.0))
        await asyncio.sleep(0.3)
        nodes.heard(node, nodes_pb.Heartbeat(egress_versions={"": 2, "shop": 1}))
        (found,) = await waiting or []
        assert found.holds("", 2)
        assert found.holds("shop", 1)
        assert time.monotonic() - began < 5
        nodes.heard(node, nodes_pb.Heartbeat(egress_problem="rules were refused"))
        found_late = await listed.wait("", 3, 1.5)
        assert [item.why_not("", 3) for item in found_late or []] == ["rules were refused"]
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))


async def test_what_a_node_says_is_wrong_is_one_plain_line_of_bounded_length(store):
    listed, nodes = EgressNodes(store), NodeRegistry(1.0, 1.0)
    node = nodes.attach("one", token("one"), nodes_pb.Hello())
    nodes.heard(node, nodes_pb.Heartbeat(egress_problem="\x1b[2J\nfine" + "x" * 5000))
    keeping = asyncio.create_task(listed.keep(nodes))
    await begun(listed)
    keeping.cancel()
    await asyncio.wait((keeping,))
    ((found,),) = [await listed.read()]
    assert found.problem.isprintable()
    assert len(found.problem) <= 500


async def test_the_list_of_a_gateway_that_is_gone_says_nothing(store):
    listed, nodes = EgressNodes(store), NodeRegistry(1.0, 1.0)
    keeping = asyncio.create_task(listed.keep(nodes))
    await begun(listed)
    keeping.cancel()
    await asyncio.wait((keeping,))
    assert await listed.read() == []
    old = datetime.now(UTC) - timedelta(seconds=STALE_SECONDS + 1)
    await store.write(lambda db: db.execute(sa.update(schema.egress_nodes).values(told_at=old)))
    assert await listed.read() is None
    assert await listed.wait("", 1, 5.0) is None


async def test_a_build_that_has_not_ended_is_read_while_it_tells_something(store, monkeypatch):
    monkeypatch.setattr("offload_builder.gateway.egresslearning.QUIET_SECONDS", 0.3)
    logs = LogBook(store, 1 << 20)

    def batch(number: int) -> ProgressBatch:
        use = EgressUse(allowed=True, host=f"h{number}.example", port=443, protocol="tcp", count=1)
        return ProgressBatch(sequence=number, egress=[use])

    async def tell() -> None:
        for number in range(2, 5):
            await asyncio.sleep(0.1)
            await logs.append("b1", [batch(number)])

    await logs.append("b1", [batch(1)])
    telling = asyncio.create_task(tell())
    learning = EgressLearning(store, logs, lambda _: False)
    learned = await learning.of_builds(["b1", "b1", "none"], follow=True)
    await telling
    await logs.flush()
    assert learned.builds == 2
    assert [item.use.host for item in learned.uses] == [f"h{n}.example" for n in range(1, 5)]
    assert 'allow = ["h1.example", "h2.example", "h3.example", "h4.example"]' in learned.proposal()
    # What is in the database is read by another process.
    beside = EgressLearning(store, LogBook(store, 1 << 20))
    assert len((await beside.of_builds(["b1"])).uses) == 4
