"""Calls that are broken off or meet another one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from offload_builder.gateway.config import GatewayConfig
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.sessions.active import ActiveSessions
from offload_builder.gateway.sessions.cost import Rates
from offload_builder.gateway.sessions.queue import SessionQueue
from offload_builder.gateway.sessions.sharing import shared_with
from offload_builder.gateway.sessions.table import (
    FAILED,
    SessionQuery,
    SessionRecord,
    SessionsTable,
)
from offload_builder.gateway.store import Store
from offload_builder.gateway.tokens import TokenRecord
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

NOW = datetime.now(UTC)
ANN = TokenRecord("t", "", "ann", identity_pb.ROLE_MEMBER, (), NOW)


class NoPlatforms:
    """Of a pool without nodes."""

    def serving(self, _project_id):
        return []


async def test_a_caller_that_goes_while_its_session_is_written_leaves_no_open_session(tmp_path):
    async with Store("sqlite://") as store:
        table = SessionsTable(store)
        active, nodes = ActiveSessions(table), NodeRegistry(5.0, 5.0)
        queue = SessionQueue(
            GatewayConfig(data_dir=tmp_path), active, nodes, NoPlatforms(), Rates(), lambda *_: None
        )
        request = sessions_pb.StartSessionRequest(request_id="r", project_id="p")
        insert, written = table.insert, asyncio.Event()

        async def written_and_not_told(record):
            await insert(record)
            written.set()
            await asyncio.Event().wait()

        table.insert = written_and_not_told
        submitting = asyncio.create_task(queue.submit(request, ANN, ""))
        async with asyncio.timeout(20):
            await written.wait()
        submitting.cancel()
        await asyncio.wait((submitting,))

        assert submitting.cancelled()
        assert not active.all()
        assert not await table.open()
        assert [one.state for one in await table.page(SessionQuery())] == [FAILED]


class SlowMembers:
    """Answers when it is told to."""

    def __init__(self):
        self.answer = asyncio.Event()

    async def tokens_of(self, name):
        await self.answer.wait()
        return [TokenRecord("x", "", name, identity_pb.ROLE_MEMBER, (), NOW)]


async def test_who_was_removed_meanwhile_is_not_shared_with_again():
    record = SessionRecord(
        session_id="a" * 16, request_id="r", project_id="p", owner="ann", token_id="t", role=2,
        name="web", state=3, created_at=NOW, shared_with=("bob",),
    )  # fmt: skip
    members = SlowMembers()
    adding = asyncio.create_task(
        shared_with(members, record, sessions_pb.ShareSessionRequest(add=["cy"]))
    )
    await asyncio.sleep(0)
    removed = await shared_with(members, record, sessions_pb.ShareSessionRequest(remove=["bob"]))
    record.shared_with = removed
    members.answer.set()

    assert await adding == ("cy",)
