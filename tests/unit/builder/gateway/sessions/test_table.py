"""Sessions in the store, and the bounds of what may be asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from offload_builder.gateway.config import GatewayConfig
from offload_builder.gateway.gatewaymetrics import gateway_metrics
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.sessions.active import ActiveSessions
from offload_builder.gateway.sessions.requests import check_bounds, checked_record
from offload_builder.gateway.sessions.table import (
    ENDED,
    PAUSED,
    QUEUED,
    RUNNING,
    SessionQuery,
    SessionRecord,
    SessionsTable,
    SessionTotal,
)
from offload_builder.gateway.store import Store
from offload_builder.gateway.tokens import TokenRecord
from offload_core.errors import InvalidValueError, OffloadError, QuotaExceededError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

NOW = datetime.now(UTC)
ANN = TokenRecord("t", "", "ann", identity_pb.ROLE_MEMBER, (), NOW)


@pytest.fixture
async def table():
    async with Store("sqlite://") as store:
        yield SessionsTable(store)


def record(number: int, owner: str = "ann", **values: Any) -> SessionRecord:
    defaults: dict[str, Any] = {
        "session_id": f"{number:016x}", "request_id": str(number), "project_id": "p",
        "owner": owner, "token_id": "t", "role": 2, "name": f"s{number}", "state": RUNNING,
        "created_at": NOW + timedelta(seconds=number),
    }  # fmt: skip
    return SessionRecord(**defaults | values)


async def test_record_comes_back_as_it_was_written(table):
    spec = sessions_pb.SessionSpec(name="web", node_labels={"a": "b"})
    full = record(
        1, spec=spec.SerializeToString(), shared_with=("bob",), devices=("x/y=z",),
        ready_at=NOW, limits=b"\x08\x01", currency="EUR", micros_per_hour=7, used_milliseconds=5,
    )  # fmt: skip
    assert await table.insert(full)
    assert await table.find(full.session_id) == full
    assert (await table.find(full.session_id)).wish == spec
    assert not await table.insert(record(2, request_id="1"))
    assert (await table.find_request("t", "1")).session_id == full.session_id


async def test_member_finds_own_and_shared_sessions_and_no_others(table):
    for item in (
        record(1),
        record(2, "bob", shared_with=("ann", "cy")),
        record(3, "bob", shared_with=("joann", "an%")),
        record(4, state=ENDED, ended_at=NOW),
        record(5, project_id="q"),
    ):
        await table.insert(item)

    async def names(**query: Any) -> list[str]:
        return [item.name for item in await table.page(SessionQuery(**query))]

    assert await names(member="ann") == ["s5", "s4", "s2", "s1"]
    assert await names(member="ann", open_only=True, project_ids=("p",)) == ["s2", "s1"]
    assert await names(member="a%") == []
    assert await names(limit=2) == ["s5", "s4"]


async def test_use_is_summed_up_in_the_database_and_only_for_its_owner(table):
    ended: dict[str, Any] = {"state": ENDED, "ended_at": NOW, "used_milliseconds": 5}
    for number in range(1, 5):
        await table.insert(record(number, **ended, currency="EUR", micros_per_hour=7))
    await table.insert(record(5, **ended, currency="USD", micros_per_hour=7))
    await table.insert(record(6, "bob", **ended))
    await table.insert(record(7, **ended, project_id="q"))
    await table.insert(record(8, **ended | {"ended_at": NOW - timedelta(days=2)}))
    await table.insert(record(9))
    await table.insert(record(10, "bob"))
    since = NOW - timedelta(days=1)

    totals, still = await table.used_since("p", since, "ann")
    assert totals == [
        SessionTotal("ann", "EUR", 7, 4, 20, NOW + timedelta(seconds=4)),
        SessionTotal("ann", "USD", 7, 1, 5, NOW + timedelta(seconds=5)),
    ]
    assert [item.name for item in still] == ["s9"]
    totals, still = await table.used_since("p", since)
    assert [(item.owner, item.sessions) for item in totals] == [("ann", 4), ("ann", 1), ("bob", 1)]
    assert len(still) == 2
    assert await table.used_since("p", NOW + timedelta(seconds=1), "cy") == ([], [])


async def test_only_sessions_that_ended_long_ago_are_forgotten(table):
    old = NOW - timedelta(days=40)
    await table.insert(record(1, created_at=old))
    await table.insert(record(2, created_at=old, state=ENDED, ended_at=NOW))
    await table.insert(record(3, created_at=old, state=ENDED, ended_at=old))
    assert await table.forget_ended(NOW - timedelta(days=30)) == 1
    assert [item.name for item in await table.page(SessionQuery())] == ["s1", "s2"]


async def test_operators_wish_is_found_until_the_session_has_ended(table):
    await table.insert(record(1))
    assert (await table.mark_stopped(record(1).session_id, "first")).stop_reason == "first"
    assert (await table.mark_stopped(record(1).session_id, "second")).stop_reason == "first"
    assert await table.marked() == {record(1).session_id: "first"}
    table.change(record(1).session_id, state=ENDED)
    assert await table.marked() == {}
    assert await table.mark_stopped("f" * 16, "x") is None


async def test_time_of_a_session_never_goes_back_and_passes_while_it_runs(table):
    sessions = ActiveSessions(table)
    session = sessions.add(record(1))
    sessions.note_time(session, 5000, b"")
    sessions.note_time(session, 3000, b"")
    assert session.record.used_milliseconds == 5000
    session.told_at -= 2.0
    assert 7000 <= session.used_milliseconds() < 60_000
    sessions.change(session, state=QUEUED)
    assert session.used_milliseconds() == 5000


async def test_node_of_a_member_is_that_of_the_newest_session_that_is_ready(table):
    sessions = ActiveSessions(table)
    sessions.add(record(1, node_id="one"))
    newest = sessions.add(record(2, node_id="two", state=PAUSED))
    sessions.add(record(3, state=QUEUED))
    sessions.add(record(4, owner="bob", node_id="three"))
    sessions.add(record(5, project_id="q", node_id="four"))
    others = {("p", "bob"): "three", ("q", "ann"): "four"}
    assert sessions.places() == {("p", "ann"): "two", **others}
    sessions.change(newest, state=ENDED)
    assert sessions.places() == {("p", "ann"): "one", **others}


async def test_counts_by_state_are_told_to_prometheus(table):
    sessions = ActiveSessions(table)
    for number in range(3):
        sessions.add(record(number))
    builds = type("None", (), {"all": lambda _: []})()
    metrics = gateway_metrics(NodeRegistry(1.0, 1.0), builds, dict, sessions)
    assert metrics.get_sample_value("offload_sessions", {"state": "running"}) == 3
    assert metrics.get_sample_value("offload_sessions", {"state": "paused"}) == 0


def request(request_id: str = "r", **spec: Any) -> sessions_pb.StartSessionRequest:
    wanted = sessions_pb.SessionSpec(**spec)
    return sessions_pb.StartSessionRequest(project_id="p", request_id=request_id, spec=wanted)


def test_session_without_a_name_is_the_default_one():
    found = checked_record(request(), ANN, "untrusted-ann")
    assert (found.name, found.wish.name, found.owner) == ("default", "default", "ann")
    assert (found.state, found.trust_domain, len(found.session_id)) == (
        QUEUED, "untrusted-ann", 16,
    )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "-a"},
        {"name": "a.b"},
        {"name": "\u00e4"},
        {"name": "a" * 41},
        {"devices": ["x,alias=y"]},
        {"devices": [""]},
        {"devices": ["x" * 300]},
        {"devices": ["a/b=c"] * 17},
        {"node_labels": {"": "x"}},
        {"node_labels": {"k": "v" * 101}},
        {"node_labels": {"k": "\x1b[31m"}},
        {"node_labels": {"a b": "x"}},
        {"cpu_millis": -1},
        {"memory_bytes": 1 << 61},
        {"ttl": {"seconds": 0}},
        {"idle_timeout": {"seconds": 1 << 40}},
    ],
)
def test_wish_that_cannot_be_is_refused(spec):
    with pytest.raises(InvalidValueError):
        checked_record(request(**spec), ANN, "")


async def test_bounds_are_of_members_and_of_projects_and_names_of_owners(table):
    sessions = ActiveSessions(table)
    for number, owner in enumerate(("ann", "ann", "bob")):
        sessions.add(record(number, owner))

    def refused(owner: str, name: str = "new", **bounds: int) -> type[OffloadError] | None:
        config = GatewayConfig(**{"sessions_per_member": 3, "sessions_per_project": 9} | bounds)
        try:
            check_bounds(config, sessions, record(9, owner, name=name))
        except OffloadError as error:
            return type(error)
        return None

    assert refused("ann") is None
    assert refused("ann", "s0") is UsageError
    assert refused("bob", "s0") is None
    assert refused("ann", sessions_per_member=2) is QuotaExceededError
    assert refused("cy", sessions_per_project=3) is QuotaExceededError
    assert refused("ann", sessions_per_member=0, sessions_per_project=0) is None
    with pytest.raises(UsageError):
        checked_record(request(request_id=""), ANN, "")
