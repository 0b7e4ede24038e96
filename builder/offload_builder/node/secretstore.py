"""The secrets of one build, asked of its client at once and held until the build ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_core.aio import TaskSet
from offload_core.errors import ContextError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_builder.node.clientlink import ClientLink

MAX_BYTES = 500 * 1024
"""BuildKit's MaxSecretSize."""
MAX_NOTED = 100
MAX_NOTED_CHARACTERS = 100
_GIT_LOGINS = ("GIT_AUTH_TOKEN", "GIT_AUTH_HEADER")
"""Names under which BuildKit asks for logins at git servers; ".HOST" may follow."""


class BuildSecrets:
    """Secrets by name, in memory only: nothing here prints, logs or stores a value.

    They are fetched when the build starts, so that it needs its client no longer for them.
    """

    def __init__(self, link: ClientLink, ids: Sequence[str]) -> None:
        self._link = link
        self.ids = tuple(dict.fromkeys(ids))
        self._values: dict[str, bytearray] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet()
        self._over = False

    def __repr__(self) -> str:
        return f"BuildSecrets({list(self.ids)})"

    def note(self, secret_id: str) -> None:
        """Note a secret that BuildKit has asked a client of its own for."""
        if secret_id not in self.ids and len(self.ids) < MAX_NOTED:
            self.ids = (*self.ids, secret_id[:MAX_NOTED_CHARACTERS])

    def fetch(self) -> None:
        """Ask for all of them."""
        for secret_id in self.ids:
            work = self._fetch(secret_id)
            self._fetching[secret_id] = self._tasks.start(work, name=f"secret {secret_id}")

    async def wait_complete(self) -> None:
        """Wait until the client is needed no more for them."""
        if self._fetching:
            await asyncio.wait(self._fetching.values())

    async def _fetch(self, secret_id: str) -> None:
        reply = await self._link.request_secret(secret_id)
        if reply.error:
            raise ContextError(reply.error[:1000])
        if len(reply.data) > MAX_BYTES:
            raise ContextError(f"secret {secret_id} too big. max size 500KiB")
        if reply.found and not self._over:
            self._values[secret_id] = bytearray(reply.data)

    async def get(self, secret_id: str) -> bytes | None:
        """Return a secret, or None if there is none of this name.

        Raises:
            ContextError: the client cannot read it.
            NodeLostError: the client went away before it had sent it.
        """
        task = self._fetching.get(secret_id)
        if task is not None:
            await asyncio.wait((task,))
            if not task.cancelled() and isinstance(error := task.exception(), OffloadError):
                raise error
        value = self._values.get(secret_id)
        return None if value is None else bytes(value)

    def forget_steps(self) -> None:
        """Wipe what steps may have used; logins of git are needed until the cache is exported."""
        self._wipe(name for name in list(self._values) if name.partition(".")[0] not in _GIT_LOGINS)

    async def close(self) -> None:
        """Wipe everything."""
        self._over = True
        await self._tasks.close()
        for task in self._fetching.values():
            if not task.cancelled():
                task.exception()
        self._wipe(list(self._values))

    def _wipe(self, names: Iterable[str]) -> None:
        for name in names:
            value = self._values.pop(name)
            value[:] = bytes(len(value))
