"""The gateway's board of connectors: who is asked, what nodes hear, and what is refused."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from offload_builder.gateway.connectors import MAX_CONNECTORS, ConnectorBoard, OnlineConnector
from offload_builder.gateway.egresspolicies import POOL, EgressPolicies
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.store import Store
from offload_builder.gateway.tokens import TokenRecord
from offload_core.errors import AccessDeniedError, OffloadError, QuotaExceededError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.connector_service_pb2 import Destination, ServeResponse

POLICY = """\
pool = "eu-1"
posture = "open"
contact = "#net"
[[rule]]
id = "office"
allow = ["a.corp", "b.corp"]
ports = [443]
via = "connector"
"""
A, B, PUBLIC = ("a.corp", 443), ("b.corp", 443), ("pypi.org", 443)


class Pool:
    """A board with one node, whose messages are kept."""

    def __init__(self, store: Store) -> None:
        self.policies = EgressPolicies(store)
        self.nodes = NodeRegistry(2.0, 1.0)
        self.board = ConnectorBoard(self.policies, self.nodes, lambda _: ["10.0.0.1:7450"])
        self.node = self.attach("one")

    def attach(self, node_id: str, *projects: str):
        token = TokenRecord(
            f"t-{node_id}", "", node_id, identity_pb.ROLE_NODE, projects, datetime.now(UTC)
        )
        return self.nodes.attach(node_id, token, nodes_pb.Hello(slots=1))

    async def apply(self, text: str = POLICY) -> None:
        await self.policies.apply(POOL, text, file="p.toml", author="ann")

    async def add(self, name: str, *wanted, member: str = "ann", project_id: str = "shop"):
        one = OnlineConnector(project_id, name, member, "192.0.2.1", wanted)
        await self.board.add(one)
        return one

    async def heard(self, node=None) -> nodes_pb.AttachResponse:
        """Return the last message to a node."""
        async with asyncio.timeout(2):
            return (await (node or self.node).connection.take())[-1]

    def wish(self, target, project_id: str = "shop", node=None) -> None:
        wish = nodes_pb.ConnectionWish(
            call_id="c" * 32,
            project_id=project_id,
            destination=Destination(host=target[0], port=target[1]),
        )
        self.board.wish(node or self.node, wish)


@pytest.fixture
async def pool(tmp_path):
    async with Store(f"sqlite:///{tmp_path / 'g.sqlite'}") as store:
        one = Pool(store)
        await one.apply()
        yield one


def served(message: nodes_pb.AttachResponse) -> dict[str, list[tuple[str, int]]]:
    return {
        project.project_id: [(item.host, item.port) for item in project.destinations]
        for project in message.served_destinations.projects
    }


async def test_nodes_hear_only_what_a_rule_gives_to_connectors(pool):
    one = await pool.add("office-1", A, PUBLIC, ("a.corp", 80))
    assert served(await pool.heard()) == {"shop": [A]}
    welcome = one.outbox.get_nowait().welcome
    assert (welcome.pool, welcome.contact) == ("eu-1", "#net")
    assert [item.permitted for item in welcome.destinations] == [True, False, False]
    reasons = [item.reason for item in welcome.destinations]
    assert reasons[1] == 'no rule with via = "connector" names pypi.org'
    assert "no rule for that allows a.corp:80" in reasons[2]
    await pool.apply('posture = "open"\n')
    await pool.board.policies_changed()
    assert served(await pool.heard()) == {}
    assert not one.outbox.get_nowait().welcome.destinations[0].permitted
    pool.board.remove(one)
    assert served(await pool.heard()) == {}


async def test_connectors_of_the_project_are_asked_in_turn_and_no_others(pool):
    first = await pool.add("office-1", A)
    second = await pool.add("office-2", A, B)
    await pool.add("elsewhere", A, project_id="other")
    for one in (first, second):
        one.outbox.get_nowait()
    for _ in range(2):
        pool.wish(A)
    calls = [one.outbox.get_nowait().call for one in (first, second)]
    assert {call.server_name for call in calls} == {"one.node.offload"}
    assert calls[0].endpoints == ["10.0.0.1:7450"]
    pool.wish(B)
    assert second.outbox.get_nowait().call.destination.host == "b.corp"
    await pool.heard()
    pool.board.refused(second, "c" * 32, "it does not answer")
    assert (await pool.heard()).call_refused.reason == "it does not answer"
    # Nobody serves it, nobody may, and a node of another project.
    pool.wish(PUBLIC)
    assert (await pool.heard()).call_refused.reason == "no connector serves it now"
    other = pool.attach("two", "other")
    pool.wish(A, node=other)
    assert (await pool.heard(other)).call_refused.reason == "no connector serves it now"
    # Who waits hears that a connector has gone.
    pool.wish(B)
    pool.board.remove(second)
    reasons = [item.call_refused.reason for item in await pool.node.connection.take()]
    assert 'the connector "office-2" has gone' in reasons


async def test_a_name_is_one_members_and_a_project_has_a_bounded_number(pool):
    first = await pool.add("office-1", A)
    with pytest.raises(AccessDeniedError, match='"ann" runs a connector "office-1"'):
        await pool.add("office-1", A, member="eve")
    again = await pool.add("office-1", A)
    first.outbox.get_nowait()
    assert isinstance(first.outbox.get_nowait(), OffloadError)
    pool.board.remove(first)
    assert pool.board.online("shop") == [again]
    for number in range(MAX_CONNECTORS - 1):
        await pool.add(f"more-{number}", A)
    with pytest.raises(QuotaExceededError, match="8 connectors already"):
        await pool.add("one-more", A)


async def test_a_node_hears_of_its_own_projects_only(pool):
    other = pool.attach("two", "other")
    await pool.add("office-1", A)
    await pool.add("office-2", B, project_id="other")
    assert served(await pool.heard()) == {"shop": [A], "other": [B]}
    assert served(await pool.heard(other)) == {"other": [B]}
    again = pool.attach("three", "more")
    await pool.board.greet(again)
    assert served(await pool.heard(again)) == {}


async def test_a_connector_whose_login_has_ended_serves_nothing_even_if_it_reads_nothing(pool):
    one = await pool.add("office-1", A)
    while one.post(ServeResponse()):
        pass
    pool.wish(A)
    assert (await pool.heard()).call_refused.reason == 'the connector "office-1" is too busy'
    pool.board.dismiss(one, AccessDeniedError("the login has ended"))
    assert served(await pool.heard()) == {}
    pool.wish(A)
    assert (await pool.heard()).call_refused.reason == "no connector serves it now"
    # The last thing that its stream will say.
    *_, last = (one.outbox.get_nowait() for _ in range(one.outbox.qsize()))
    assert isinstance(last, AccessDeniedError)


async def test_what_a_rule_gave_that_has_ended_is_served_no_more_and_told_once(pool):
    end = datetime.now(UTC) + timedelta(seconds=0.5)
    await pool.apply(f"{POLICY}expires = {end.isoformat()}\n")
    one = await pool.add("office-1", A)
    assert one.outbox.get_nowait().welcome.destinations[0].permitted
    await pool.board.follow(one)
    assert one.outbox.empty()
    assert served(await pool.heard()) == {"shop": [A]}
    await asyncio.sleep((end - datetime.now(UTC)).total_seconds() + 0.01)
    for _ in range(2):
        await pool.board.follow(one)
    assert not one.outbox.get_nowait().welcome.destinations[0].permitted
    assert one.outbox.empty()
    assert served(await pool.heard()) == {}
