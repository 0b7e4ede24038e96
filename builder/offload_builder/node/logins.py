"""Registry logins of the person who builds, for BuildKit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core.errors import NodeLostError

if TYPE_CHECKING:
    from offload_builder.node.clientlink import ClientLink


class ClientLogins:
    """Registry logins, asked of the client once; nothing of them leaves this object's memory."""

    def __init__(self, link: ClientLink) -> None:
        self._link = link
        self._known: dict[str, tuple[str, str]] = {}

    @property
    def given(self) -> bool:
        """Whether the client had a login for a registry that was asked for."""
        return bool(self._known)

    async def credentials(self, host: str) -> tuple[str, str]:
        """Return user and secret for a registry; two empty strings for none.

        The cache is exported when the client may have left: then what it has said holds, and an
        unknown registry is read without a login.
        """
        if host in self._known:
            return self._known[host]
        try:
            found = await self._link.request_credentials(host)
        except NodeLostError:
            return "", ""
        if any(found):
            self._known[host] = found
        return found
