"""A lease in the shared store: while it counts, no collection deletes what it names."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from offload_cache.collection.documents import LeaseDocument
from offload_cache.collection.timing import LEASE_RENEW_SECONDS, LEASE_SECONDS, REQUEST_SECONDS
from offload_cache.keys import named_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from offload_cache.objectstore import ObjectStore


class Lease:
    """One lease of one owner; `renew` takes it, and takes it again when it has run out."""

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        holder: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = named_key(project_id, "leases", secrets.token_hex(12))
        self._objects = objects
        self._holder = holder
        self._clock = clock
        self._written: LeaseDocument | None = None
        self._renew_at = 0.0
        self._until = float("-inf")

    @property
    def holds(self) -> bool:
        """Whether what it names is safe now, and has been since `renew` last said False."""
        return self._clock() < self._until

    async def renew(
        self,
        digests: Iterable[str],
        contributions: Iterable[tuple[str, str]] = (),
    ) -> bool:
        """Make the lease count for what is named here, with a request only where one is needed.

        Returns:
            Whether it counted without a break since the last call. After False, all that was
            checked before is void.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        document = LeaseDocument(
            self._holder, LEASE_SECONDS, frozenset(digests), frozenset(contributions)
        )
        started = self._clock()
        if document == self._written and started < min(self._renew_at, self._until):
            return True
        held_until = self._until
        await self._objects.write_bytes(self.key, document.to_bytes())
        self._written = document
        self._renew_at = started + LEASE_RENEW_SECONDS
        self._until = started + LEASE_SECONDS - REQUEST_SECONDS
        return self._clock() < held_until

    async def end(self) -> None:
        """Give the lease up.

        Raises:
            CacheUnavailableError: the store does not answer; the lease runs out by itself.
        """
        written, self._written = self._written, None
        self._until = float("-inf")
        if written is not None:
            await self._objects.delete(self.key)
