"""Takes revocations from the database to where certificates are used: nodes, streams, the queue."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from offload_builder.gateway import schema
from offload_builder.revocations import Revocations
from offload_core.errors import AuthenticationError, OffloadError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.admission import Admission
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.sessions.ending import SessionEnding
    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

POLL_SECONDS = 5.0
"""How soon a revocation takes effect that a command wrote on the gateway's machine."""
MINIMUM_KEEP = timedelta(days=30)
"""Revocations are remembered for so long at least: lifetimes may have been longer before."""


class RevocationFeed:
    """Tells nodes whom to refuse: when they attach, and at every change."""

    def __init__(
        self,
        config: GatewayConfig,
        store: Store,
        nodes: NodeRegistry,
        admission: Admission,
        sessions: SessionEnding,
    ) -> None:
        """Feed `taken`, which this process's own calls are checked against, and the nodes."""
        seconds = max(config.member_certificate_lifetime, config.node_certificate_lifetime)
        self._keep = max(MINIMUM_KEEP, timedelta(seconds=seconds))
        self._store = store
        self._nodes = nodes
        self._admission = admission
        self._sessions = sessions
        self.taken = Revocations()
        self._told: dict[str, float] = {}

    async def greet(self, node: AttachedNode) -> None:
        """Tell one node that has just attached."""
        node.post(_message(await self._read()))

    async def refresh(self) -> None:
        """Read the database and let what is new take effect everywhere.

        Raises:
            OffloadError: the database cannot be read.
        """
        until = await self._read()
        self.taken.take(until)
        for token_id in {build.record.token_id for build in self._admission.builds()}:
            if token_id in until:
                self._admission.cancel_token(token_id, why=f"the token {token_id} was revoked")
        for token_id in self._sessions.tokens() & until.keys():
            self._sessions.stop_token(token_id, f"the token {token_id} was revoked")
        added = until.keys() - self._told.keys()
        changed, self._told = until != self._told, until
        for token_id in added:
            why = AuthenticationError(f"the token {token_id} of this node was revoked")
            self._nodes.disconnect_token(token_id, why)
        if changed:
            message = _message(until)
            told = [node.node_id for node in self._nodes.connected() if node.post(message)]
            log.info("token.revocations.sent", tokens=len(until), nodes=told)

    async def run(self) -> None:
        """Refresh now and then, for changes of other processes, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.refresh()
            except OffloadError as error:
                log.error("token.revocations.unreadable", exc_info=error)

    async def _read(self) -> dict[str, float]:
        now = datetime.now(UTC)
        keep = self._keep

        def work(db: sa.Connection) -> dict[str, float]:
            found: dict[str, float] = {}
            for table, key in (
                (schema.tokens, schema.tokens.c.token_id),
                (schema.node_enrolments, schema.node_enrolments.c.enrolment_id),
            ):
                recent = sa.select(key, table.c.revoked_at).where(table.c.revoked_at > now - keep)
                for token_id, revoked_at in db.execute(recent):
                    found[token_id] = (revoked_at + keep).timestamp()
            logins = schema.external_logins
            ended = sa.select(logins.c.token_id, logins.c.expires_at).where(
                logins.c.revoked_at.is_not(None), logins.c.expires_at > now
            )
            for token_id, expires_at in db.execute(ended):
                found[token_id] = expires_at.timestamp()
            return found

        return await self._store.read(work)


def _message(until: dict[str, float]) -> nodes_pb.AttachResponse:
    message = nodes_pb.RevocationList()
    for token_id, end in until.items():
        message.revocations.add(token_id=token_id).until.FromSeconds(int(end))
    return nodes_pb.AttachResponse(revocations=message)
