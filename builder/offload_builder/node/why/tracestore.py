"""Keeps traces: on this node's disk, and in the shared store for the other nodes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.why.trace import MAX_TRACE_BYTES, BuildTrace
from offload_cache.keys import named_key
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore

log = structlog.get_logger(__name__)

KEPT_HERE = 500
"""Traces of one project on this node's disk; the oldest go first."""
_KIND = "traces"
_KEY_NAME = "key"
_KEY_BYTES = 32
_SECONDS = 5.0


class TraceStore:
    """The traces of one project. Nothing here fails a build: what cannot be kept is not kept."""

    def __init__(self, project_id: str, folder: Path, objects: ObjectStore | None) -> None:
        self._project_id = project_id
        self._folder = folder
        self._objects = objects
        self._key: bytes | None = None
        self._saved = 0

    async def argument_digests(self, arguments: Mapping[str, str]) -> dict[str, str]:
        """Return a keyed digest of each value; only nodes of the pool know the key."""
        if not arguments:
            return {}
        key = await self._secret()
        return {
            name: hmac.new(key, f"{name}={value}".encode(), hashlib.sha256).hexdigest()[:32]
            for name, value in arguments.items()
        }

    async def save(self, trace: BuildTrace) -> None:
        """Keep a trace here, and for the other nodes where there is a shared store."""
        data = await asyncio.to_thread(trace.to_bytes)
        if len(data) > MAX_TRACE_BYTES:
            return
        try:
            await asyncio.to_thread(self._write, trace.build_id, data)
        except OSError as error:
            log.warning("trace.save.failed", build_id=trace.build_id, cause=str(error))
        if self._objects is None or not self._objects.reachable:
            return
        with contextlib.suppress(CacheUnavailableError):
            await self._objects.write_bytes(
                named_key(self._project_id, _KIND, trace.build_id), data
            )

    async def find(self, build_id: str) -> BuildTrace | None:
        """Return the trace of a build, None when none is to be had."""
        try:
            name = named_key(self._project_id, _KIND, build_id)
        except UsageError:
            return None
        data = await asyncio.to_thread(self._read, build_id)
        if data is None and self._objects is not None and self._objects.reachable:
            with contextlib.suppress(CacheUnavailableError, NotFoundError):
                data = await self._objects.read_bytes(
                    name, max_bytes=MAX_TRACE_BYTES, timeout=_SECONDS
                )
        if data is None:
            return None
        try:
            return BuildTrace.from_bytes(data)
        except UsageError as error:
            log.warning("trace.unreadable", build_id=build_id, cause=error.message)
            return None

    async def _secret(self) -> bytes:
        if self._key is not None:
            return self._key
        path = self._folder / _KEY_NAME
        own = await asyncio.to_thread(_read_file, path)
        if own is None:
            own = secrets.token_bytes(_KEY_BYTES)
            await self._keep_key(path, own)
        shared = own if self._objects is None else await self._shared_secret(self._objects, own)
        if shared is None:
            # The next build asks again: digests with another key would look like other values.
            return own
        if shared != own:
            await self._keep_key(path, shared)
        self._key = shared
        return shared

    @staticmethod
    async def _keep_key(path: Path, key: bytes) -> None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_write_file, path, key)

    async def _shared_secret(self, objects: ObjectStore, own: bytes) -> bytes | None:
        """Return the key of all nodes, ours if there was none; None when nobody knows."""
        name = named_key(self._project_id, _KIND, _KEY_NAME)
        with contextlib.suppress(CacheUnavailableError, NotFoundError):
            if await objects.create_bytes(name, own):
                return own
            return await objects.read_bytes(name, max_bytes=_KEY_BYTES, timeout=_SECONDS)
        return None

    def _write(self, build_id: str, data: bytes) -> None:
        _write_file(self._folder / f"{build_id}.trace", data)
        self._saved += 1
        if self._saved % 50 == 1:
            traces = sorted(self._folder.glob("*.trace"), key=lambda path: path.stat().st_mtime)
            for path in traces[:-KEPT_HERE]:
                path.unlink(missing_ok=True)

    def _read(self, build_id: str) -> bytes | None:
        return _read_file(self._folder / f"{build_id}.trace")


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        scratch.touch(mode=0o600)
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
