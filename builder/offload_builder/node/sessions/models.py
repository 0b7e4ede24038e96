"""Model files of a project, which all of its sessions have in one volume.

The volume `offload-models` of an engine is filled from the pool's shared store before the first
container that mounts it is made, and stored again when it is no longer used: by content, as cache
mounts of builds are, so what is there already does not travel, and counted with them in what the
project has of the shared store. Of two sessions at a time, the volume of the one that ends last is
what the next one gets. Members without trust read the files of others, and store none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.node.mounts.documents import MountDocument
from offload_builder.node.mounts.keeping import pack
from offload_builder.node.mounts.library import MountLibrary
from offload_builder.node.mounts.naming import MountName
from offload_builder.node.mounts.restoring import Patience, restore
from offload_builder.node.mounts.workerlink import MountWorker
from offload_builder.node.sessions.contract import MODELS_VOLUME
from offload_builder.node.trustdomain import TrustDomain
from offload_core.enginecalls import UnixConnection, call_engine
from offload_core.errors import NotFoundError, OffloadError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload_builder.node.sessions.contract import Engine, SessionPlace
    from offload_cache.nodestore import NodeStore

log = structlog.get_logger(__name__)

RESTORE_SECONDS = 3600.0
"""Weights may have a hundred gigabytes; whoever waits can interrupt the command."""
SILENCE_SECONDS = 30.0
_NAME = MountName(MODELS_VOLUME, "", "any")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(eq=False)
class _Known:
    """What is known of the volume in one engine."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    ready: bool = False
    tree: str = ""
    """Digest of what the shared store has of it."""


class SessionModels:
    """The volumes with models of all sessions at a node.

    Args:
        store: of all projects.
        indexes: directory for what is known of the files, one for each engine.
        node: name of this node, for the documents.
        max_bytes: bound of the files of a project; 0 keeps none.
    """

    def __init__(self, store: NodeStore, indexes: Path, *, node: str, max_bytes: int) -> None:
        self._store = store
        self._indexes = indexes
        self._node = node
        self._max_bytes = max_bytes
        self._known: dict[str, _Known] = {}

    async def prepare(self, engine: Engine, place: SessionPlace) -> None:
        """Have the files in an engine before a container mounts them.

        What cannot be had is no error: the container then finds an empty volume.

        Raises:
            NodeLostError: the engine does not answer.
        """
        known = self._known.setdefault(engine.engine_id, _Known())
        async with known.turn:
            if known.ready or not self._max_bytes or self._store.objects is None:
                return
            volume = await _made(engine)
            if volume:
                try:
                    await self._restore(engine, place, volume, known)
                except (OffloadError, OSError) as error:
                    log.warning(
                        "session.models.not_restored",
                        session_id=place.session_id,
                        cause=error.message if isinstance(error, OffloadError) else str(error),
                    )
            known.ready = True

    async def keep(self, engine: Engine, place: SessionPlace) -> None:
        """Store the files of an engine that runs, while no container uses them.

        What cannot be stored is no error: the next session then finds what was stored before.
        """
        known = self._known.get(engine.engine_id)
        if known is None or not known.ready or not _may_store(place) or not self._max_bytes:
            return
        async with known.turn:
            try:
                await self._keep(engine, place, known)
            except QuotaExceededError as error:
                log.warning(
                    "session.models.too_large",
                    session_id=place.session_id,
                    project_id=place.project_id,
                    cause=error.message,
                )
            except (OffloadError, OSError) as error:
                log.warning(
                    "session.models.not_kept",
                    session_id=place.session_id,
                    cause=error.message if isinstance(error, OffloadError) else str(error),
                )

    def forget(self, engine_id: str) -> None:
        """Hear that an engine is gone."""
        self._known.pop(engine_id, None)
        self._index(engine_id).unlink(missing_ok=True)

    async def _restore(
        self, engine: Engine, place: SessionPlace, volume: str, known: _Known
    ) -> None:
        store = (await self._store.project(place.project_id)).store
        document = await MountLibrary(store).find([_scope(place)], _NAME)
        if document is None or document.content_bytes > self._max_bytes:
            return
        with _opened(engine, volume) as root:
            if os.listdir(root):  # noqa: PTH208 - a descriptor's path
                return
            patience = Patience(RESTORE_SECONDS, SILENCE_SECONDS)
            index = self._index(engine.engine_id)
            try:
                seconds = await restore(
                    store, document, root, index, patience, id_base=engine.id_base
                )
            except BaseException:
                index.unlink(missing_ok=True)
                with contextlib.suppress(OffloadError, OSError):
                    await _clear(root)
                raise
        known.tree = document.tree
        log.info(
            "session.models.restored",
            session_id=place.session_id,
            files=document.files,
            content_bytes=document.content_bytes,
            seconds=round(seconds, 3),
        )

    async def _keep(self, engine: Engine, place: SessionPlace, known: _Known) -> None:
        volume = await _found(engine)
        if not volume:
            # Its member has removed it; what is stored is the project's.
            return
        store = (await self._store.project(place.project_id)).store
        with _opened(engine, volume) as root, ExitStack() as leases:
            packed = await pack(
                store,
                root,
                self._index(engine.engine_id),
                self._max_bytes,
                leases,
                id_base=engine.id_base,
            )
            if packed.tree == known.tree or not packed.content_bytes:
                return
            document = MountDocument(
                _NAME, _scope(place), packed.tree, packed.blobs, packed.files,
                packed.content_bytes, self._node, place.session_id, datetime.now(UTC),
            )  # fmt: skip
            await MountLibrary(store).publish(document)
        known.tree = packed.tree
        log.info(
            "session.models.kept",
            session_id=place.session_id,
            files=packed.files,
            content_bytes=packed.content_bytes,
            new_bytes=packed.new_bytes,
        )

    def _index(self, engine_id: str) -> Path:
        self._indexes.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._indexes / engine_id


def _scope(place: SessionPlace) -> str:
    # No branch has such a name, so no build reads or writes there.
    return f"{place.project_id}/~sessions"


def _may_store(place: SessionPlace) -> bool:
    try:
        return not TrustDomain(place.project_id, place.trust_domain).is_untrusted
    except OffloadError:
        return False


async def _call(engine: Engine, method: str, target: str, body: bytes = b"") -> Any:
    return await call_engine(lambda: UnixConnection.open(engine.socket), method, target, body)


async def _made(engine: Engine) -> str:
    """Make the volume if it is not there; return where it lies in the engine, "" for elsewhere."""
    body = b'{"Name": "%s"}' % MODELS_VOLUME.encode()
    reply = await _call(engine, "POST", "/volumes/create", body)
    return _where(reply.json()) if reply.status in (200, 201) else ""


async def _found(engine: Engine) -> str:
    reply = await _call(engine, "GET", f"/volumes/{MODELS_VOLUME}")
    return _where(reply.json()) if reply.status == 200 else ""


def _where(volume: Any) -> str:
    """Return where a volume lies; empty where it is none of the engine's own directories."""
    if not isinstance(volume, dict) or volume.get("Driver") != "local" or volume.get("Options"):
        return ""
    return str(volume.get("Mountpoint", ""))


@contextlib.contextmanager
def _opened(engine: Engine, path: str) -> Iterator[Path]:
    """Yield a path of a directory in an engine, found without following any link of the engine's.

    Raises:
        NotFoundError: it is not there, or is no directory.
    """
    # The first one is the kernel's, and leads to the root directory of a process.
    descriptor = os.open(engine.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in Path(path).parts[1:]:
            if part == "..":
                raise NotFoundError(f"the volume {MODELS_VOLUME} is no directory of the engine")
            try:
                below = os.open(part, _DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                raise NotFoundError(
                    f"the volume {MODELS_VOLUME} is no directory of the engine: {error.strerror}"
                ) from error
            os.close(descriptor)
            descriptor = below
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


async def _clear(root: Path) -> None:
    async with MountWorker(root) as worker:
        await worker.start("clear")
        await worker.answer()
