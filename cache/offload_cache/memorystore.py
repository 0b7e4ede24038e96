# ruff: noqa: ARG002 - memory answers at once, whatever the timeout
"""An object store in memory: the shortest implementation of the contract."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_cache.health import REACHABLE
from offload_cache.objectstore import ObjectInfo
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class MemoryObjectStore:
    """Objects of one process; for embedded pools without durable sharing and for tests."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    @property
    def reachable(self) -> bool:
        """Always."""
        return True

    @property
    def state(self) -> str:
        """Always reachable."""
        return REACHABLE

    async def read(
        self,
        key: str,
        sink: Callable[[bytes], None],
        *,
        offset: int = 0,
        length: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """See ObjectStore."""
        end = None if length is None else offset + length
        data = self._get(key)[offset:end]
        sink(data)
        return len(data)

    async def read_bytes(self, key: str, *, max_bytes: int, timeout: float | None = None) -> bytes:
        """See ObjectStore."""
        data = self._get(key)
        if len(data) > max_bytes:
            raise NotFoundError(f"object {key} has more than {max_bytes} bytes")
        return data

    def _get(self, key: str) -> bytes:
        try:
            return self._objects[key][0]
        except KeyError:
            raise NotFoundError(f"there is no object {key}") from None

    async def write_file(self, key: str, path: Path) -> int:
        """See ObjectStore."""
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {path}") from error
        await self.write_bytes(key, data)
        return len(data)

    async def write_bytes(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        self._objects[key] = (data, datetime.now(UTC))

    async def stat(self, key: str, *, timeout: float | None = None) -> ObjectInfo | None:
        """See ObjectStore."""
        found = self._objects.get(key)
        return None if found is None else ObjectInfo(key, len(found[0]), found[1])

    async def list_objects(
        self, prefix: str, *, limit: int, timeout: float | None = None
    ) -> list[ObjectInfo]:
        """See ObjectStore."""
        names = sorted(key for key in self._objects if key.startswith(prefix))[:limit]
        return [ObjectInfo(key, len(self._objects[key][0]), self._objects[key][1]) for key in names]

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._objects.pop(key, None)

    async def close(self) -> None:
        """Forget everything."""
        self._objects.clear()
