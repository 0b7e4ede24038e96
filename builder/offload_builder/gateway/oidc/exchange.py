"""Exchanges a provider's token for a login, by rules that may change while the gateway runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.audit import GATEWAY, OK, AuditLog, Event
from offload_builder.gateway.oidc.idtoken import TokenVerifier
from offload_builder.gateway.oidc.policy import Policy
from offload_builder.gateway.oidc.policyfile import read_policy
from offload_builder.gateway.oidc.rules import judge, no_rule
from offload_builder.gateway.tokens import role_name
from offload_core.errors import AccessDeniedError, ConfigError, NotFoundError, OffloadError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.tokens import TokenRecord

log = structlog.get_logger(__name__)

FILE_NAME = "identity.toml"
WATCH_SECONDS = 2.0


def policy_path(config: GatewayConfig) -> Path:
    """Return the file of issuers and rules."""
    return config.identity_file or config.data_dir / FILE_NAME


class Exchange:
    """Turns tokens into logins; `run` beside it takes over a changed file."""

    def __init__(self, config: GatewayConfig, members: Members, audit: AuditLog) -> None:
        """Read the file.

        Raises:
            ConfigError: it is wrong, or was named and is not there.
        """
        self._path = policy_path(config)
        self._required = config.identity_file is not None
        self._members = members
        self._audit = audit
        self._state = _state(self._path)
        self.policy = self._read()
        self._verifier = TokenVerifier(self.policy)

    async def login(self, token: str) -> TokenRecord:
        """Return the login behind a token.

        Raises:
            AuthenticationError: the token proves nothing here.
            AccessDeniedError: no rule matches it, or the rule's project does not exist.
            GatewayUnreachableError: the issuer does not answer.
        """
        if not self.policy.issuers:
            raise AccessDeniedError(
                "this gateway takes no tokens of identity providers",
                hint="an administrator can name them in identity.toml, see docs/identity.md",
            )
        policy = self.policy
        try:
            verified = await self._verifier.verify(token)
            grant = judge(policy, verified.issuer, verified.claims).grant
            if grant is None:
                raise no_rule(verified.issuer, verified.claims)
            for project_id in grant.projects:
                await self._check_project(project_id, grant.identity.rule)
            record = await self._members.external.enter(verified, grant)
        except OffloadError as error:
            log.warning("identity.refused", reason=error.reason, error=error.message)
            raise
        log.info(
            "identity.accepted",
            issuer=grant.identity.issuer,
            subject=grant.identity.subject,
            run_url=grant.identity.run_url,
            rule=grant.identity.rule,
            member=record.name,
            role=role_name(record.role),
            token_id=record.token_id,
            lowered=grant.lowered,
        )
        return record

    async def run(self) -> None:
        """Take over the file whenever it has changed, until cancelled; a wrong one is left."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            state = await asyncio.to_thread(_state, self._path)
            if state == self._state:
                continue
            self._state = state
            try:
                self.policy = await asyncio.to_thread(self._read)
            except ConfigError as error:
                log.error("identity.reload.failed", error=error.message)
                self._note_reload(error.reason, error.message)
                continue
            self._verifier.use(self.policy)
            log.info(
                "identity.reloaded",
                issuers=len(self.policy.issuers),
                rules=len(self.policy.rules),
            )
            self._note_reload(OK, f"{len(self.policy.rules)} rules")

    def _note_reload(self, result: str, detail: str) -> None:
        self._audit.note(Event("rules.reloaded", role=GATEWAY, result=result, detail=detail))

    def _read(self) -> Policy:
        if self._state is None and not self._required:
            return Policy()
        return read_policy(self._path)

    async def _check_project(self, project_id: str, rule: str) -> None:
        try:
            await self._members.project(project_id)
        except NotFoundError:
            raise AccessDeniedError(
                f'the identity rule "{rule}" leads to the project "{project_id}", '
                "which does not exist",
                hint=f"an administrator can make it: offload-builder project create {project_id}",
            ) from None


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content; None without the file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
