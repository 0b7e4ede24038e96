"""What has to be done now and then: old builds, ended tokens, the gateway's certificate."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import AuthenticationError, OffloadError

if TYPE_CHECKING:
    from offload_builder.gateway.audit import AuditLog
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.credentials import RenewingCredentials
    from offload_builder.gateway.history import History
    from offload_builder.gateway.logretention import LogRetention
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.sessions.sessions import Sessions

log = structlog.get_logger(__name__)

TOKEN_CHECK_SECONDS = 10.0
"""How soon a node notices that its token was revoked by a command on the gateway's machine."""

SLOW_TURN_SECONDS = 3600.0


class Housekeeping:
    """Runs beside the services."""

    def __init__(
        self,
        config: GatewayConfig,
        credentials: RenewingCredentials,
        members: Members,
        nodes: NodeRegistry,
        history: History,
        log_retention: LogRetention,
        audit: AuditLog,
        sessions: Sessions,
    ) -> None:
        self._sessions = sessions
        self._config = config
        self._audit = audit
        self._credentials = credentials
        self._members = members
        self._nodes = nodes
        self._history = history
        self._log_retention = log_retention

    async def run(self) -> None:
        """Work until cancelled; a failure is logged and tried again at the next turn."""
        loop = asyncio.get_running_loop()
        next_slow_turn = loop.time()
        while True:
            try:
                if loop.time() >= next_slow_turn:
                    next_slow_turn = loop.time() + SLOW_TURN_SECONDS
                    await self._forget_old_builds()
                    await self._log_retention.sweep()
                    await self._sessions.forget_old()
                    await self._members.external.forget_ended()
                    await self._audit.prune(
                        keep_bytes=self._config.audit_keep,
                        retention_seconds=self._config.audit_retention,
                    )
                    if self._credentials.renew():
                        log.info("gateway.certificate.renewed")
                await self._check_node_tokens()
            except OffloadError as error:
                log.error("housekeeping.failed", exc_info=error)
            await asyncio.sleep(TOKEN_CHECK_SECONDS)

    async def _forget_old_builds(self) -> None:
        if self._config.history_retention:
            limit = datetime.now(UTC) - timedelta(seconds=self._config.history_retention)
            count = await self._history.delete_older_than(limit)
            if count:
                log.info("history.pruned", builds=count)

    async def _check_node_tokens(self) -> None:
        now = datetime.now(UTC)
        for token_id in {node.token.token_id for node in self._nodes.connected()}:
            token = await self._members.find_token(token_id)
            try:
                if token is None:
                    raise AuthenticationError("the token of this node no longer exists")
                token.check_holds(now)
            except AuthenticationError as error:
                self._nodes.disconnect_token(token_id, error)
