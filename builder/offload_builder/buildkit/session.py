"""A BuildKit session: the services that a build may call at the machine that asked for it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Self
from urllib.parse import quote_plus

import structlog

from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.services import session_services
from offload_builder.buildkit.tunnel import SessionTunnel
from offload_core.errors import InternalError, OffloadError

if TYPE_CHECKING:
    import asyncio

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.buildkit.providers import SessionProviders

_log = structlog.get_logger(__name__)
_PREFIX = "x-docker-expose-session-"


class BkSession:
    """An open session; `async with BkSession(...)`.

    Health checks are answered by the event loop, so nothing may block it for 15 seconds.

    Attributes:
        id: identifier, sent with each solve that the session serves.
        has_rules: it is asked about the sources of the builds that it serves.
        failure: the first error that a provider raised. BuildKit reports it in its own words and
            at the step that it hit; this is the original.
    """

    def __init__(
        self, client: BuildkitClient, shared_key: str, providers: SessionProviders
    ) -> None:
        self.id = secrets.token_hex(16)
        self.has_rules = providers.rules is not None
        self.failure: OffloadError | None = None
        self._client = client
        handlers = session_services(providers)
        metadata = session_headers(self.id, shared_key, list(handlers))
        self._tunnel = SessionTunnel(client.socket_path, metadata, handlers, self._failed)

    async def __aenter__(self) -> Self:
        """Open the session.

        Raises:
            NodeLostError: the daemon does not answer.
        """
        try:
            await self._tunnel.__aenter__()
        except GrpcError as error:
            raise await self._client.lost_error("open a session", error.message) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tunnel.__aexit__()

    @property
    def lost(self) -> asyncio.Event:
        """Set when the session ended although nobody closed it."""
        return self._tunnel.lost

    @property
    def lost_reason(self) -> str:
        """Why it ended."""
        return self._tunnel.reason

    def _failed(self, method: str, error: Exception) -> None:
        if isinstance(error, GrpcError):
            _log.debug("session.call.refused", method=method, reason=error.message)
            return
        if not isinstance(error, OffloadError):
            error = InternalError(f"{method} failed: {error!r}")
        if self.failure is None:
            self.failure = error


def session_headers(session_id: str, shared_key: str, methods: list[str]) -> list[tuple[str, str]]:
    """Return the request metadata that opens a session.

    The shared key names the copy of the local sources that the daemon keeps and compares with.
    """
    headers = [(f"{_PREFIX}uuid", session_id)]
    if all(" " <= letter <= "~" for letter in shared_key):
        headers.append((f"{_PREFIX}sharedkey", shared_key))
    else:
        headers.append((f"{_PREFIX}sharedkey", quote_plus(shared_key)))
        headers.append((f"{_PREFIX}sharedkey-encoded", "1"))
    headers += [(f"{_PREFIX}grpc-method", method) for method in methods]
    return headers
