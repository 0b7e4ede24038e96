"""The contributions of the shared store: listing them, reading them, keeping a packed copy."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import structlog

from offload_cache.contributions import MAX_CONTRIBUTION_BYTES, Contribution
from offload_cache.keys import (
    check_contribution_id,
    contribution_key,
    contributions_prefix,
    packed_key,
    used_key,
    used_prefix,
)
from offload_cache.packed import MAX_PACKED_BYTES, pack_documents, unpack_documents
from offload_cache.scopetable import MAX_PER_SCOPE
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)

_ANSWER_SECONDS = 2.0
_FETCH_SECONDS = 20.0
_PARALLEL = 8
_WORTH_PACKING = 8
_MAX_USES = 1_000
_IGNORED_SECONDS = 3600.0
_MAX_REMEMBERED = 1_000
"""Scopes whose packed object is known, and documents that are ignored."""


class SharedScopes:
    """Scopes of one project in the shared store; raises CacheUnavailableError when it is away."""

    def __init__(self, project_id: str, objects: ObjectStore, executor: ThreadPoolExecutor) -> None:
        self._project_id = project_id
        self._objects = objects
        self._executor = executor
        self._packed: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._ignored: OrderedDict[tuple[str, str], float] = OrderedDict()

    @property
    def reachable(self) -> bool:
        """Whether the next call is worth trying."""
        return self._objects.reachable

    async def names(self, scope: str) -> list[str]:
        """Return the newest contributions of a scope, newest first.

        What turned out to be of no use is left out for a while: it would be read at each listing.
        """
        prefix = contributions_prefix(self._project_id, scope)
        found = await self._objects.list_objects(
            prefix, limit=MAX_PER_SCOPE, timeout=_ANSWER_SECONDS
        )
        names = []
        for info in found:
            try:
                name = check_contribution_id(info.key.removeprefix(prefix))
                if not self._is_ignored(scope, name):
                    names.append(name)
            except UsageError:
                _log.warning("cache.contribution.ignored", object_key=info.key, cause="its name")
        return names

    async def read(self, scope: str, names: Sequence[str]) -> list[tuple[Contribution, bytes]]:
        """Return contributions with their documents; damaged and missing ones are left out.

        Many at once come from the packed object as far as it has them.
        """
        documents: dict[str, bytes] = {}
        if len(names) >= _WORTH_PACKING:
            documents = await self._read_packed(scope)
        gate = asyncio.Semaphore(_PARALLEL)

        async def fetch(name: str) -> None:
            key = contribution_key(self._project_id, scope, name)
            async with gate:
                try:
                    documents[name] = await self._objects.read_bytes(
                        key, max_bytes=MAX_CONTRIBUTION_BYTES, timeout=_FETCH_SECONDS
                    )
                except NotFoundError:
                    return  # removed meanwhile

        missing = [name for name in names if name not in documents]
        results = await asyncio.gather(*map(fetch, missing), return_exceptions=True)
        wanted = [(name, documents[name]) for name in names if name in documents]
        read = await asyncio.get_running_loop().run_in_executor(
            self._executor, self._check, scope, wanted
        )
        for name in documents.keys() & set(names) - {found.contribution_id for found, _ in read}:
            self._ignored[scope, name] = time.monotonic() + _IGNORED_SECONDS
        _cut(self._ignored)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, CacheUnavailableError):
                raise result
        if not read and (failed := next((r for r in results if r is not None), None)) is not None:
            raise failed
        return read

    def _is_ignored(self, scope: str, name: str) -> bool:
        return self._ignored.get((scope, name), 0.0) > time.monotonic()

    @staticmethod
    def _check(
        scope: str, documents: Sequence[tuple[str, bytes]]
    ) -> list[tuple[Contribution, bytes]]:
        found = []
        for name, body in documents:
            try:
                contribution = Contribution.from_bytes(body)
                if (contribution.scope, contribution.contribution_id) != (scope, name):
                    raise UsageError("it says that it is another")
            except UsageError as error:
                _log.warning(
                    "cache.contribution.ignored", scope=scope, name=name, cause=error.message
                )
                continue
            found.append((contribution, body))
        return found

    async def _read_packed(self, scope: str) -> dict[str, bytes]:
        try:
            data = await self._objects.read_bytes(
                packed_key(self._project_id, scope),
                max_bytes=MAX_PACKED_BYTES,
                timeout=_FETCH_SECONDS,
            )
            documents = unpack_documents(data)
        except (NotFoundError, UsageError):
            documents = {}
        self._note_packed(scope, documents)
        return documents

    async def is_packing_due(self, scope: str, names: Sequence[str]) -> bool:
        """Whether enough contributions are missing in the packed object to write it anew."""
        if len(set(names) - self._packed.get(scope, frozenset())) < _WORTH_PACKING:
            return False
        # Another node may have written it since it was read here.
        packed = await self._read_packed(scope)
        return len(set(names) - packed.keys()) >= _WORTH_PACKING

    async def write_packed(self, scope: str, documents: list[tuple[str, bytes]]) -> None:
        """Write the packed object, newest contributions first.

        Nodes may overwrite each other's: readers fetch what they miss one by one.
        """
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._executor, pack_documents, documents)
        await self._objects.write_bytes(packed_key(self._project_id, scope), data)
        self._note_packed(scope, (name for name, _ in documents))
        _log.info(
            "cache.contributions.packed", scope=scope, count=len(documents), size_bytes=len(data)
        )

    def _note_packed(self, scope: str, names: Iterable[str]) -> None:
        self._packed[scope] = frozenset(names)
        self._packed.move_to_end(scope)
        _cut(self._packed)

    async def uses(self, scope: str) -> list[tuple[str, float]]:
        """Return when keys of a scope were last of use, in seconds since the epoch."""
        prefix = used_prefix(self._project_id, scope)
        found = await self._objects.list_objects(prefix, limit=_MAX_USES, timeout=_ANSWER_SECONDS)
        return [
            (unquote(info.key.removeprefix(prefix)), info.modified_at.timestamp()) for info in found
        ]

    async def mark_use(self, scope: str, key: str) -> float:
        """Write that a key was of use now; return the time in seconds since the epoch."""
        await self._objects.write_bytes(used_key(self._project_id, scope, key), b"")
        return datetime.now(UTC).timestamp()


def _cut(table: OrderedDict[Any, Any]) -> None:
    while len(table) > _MAX_REMEMBERED:
        table.popitem(last=False)
