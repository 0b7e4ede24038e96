"""Builds that have ended, kept for clients that come back: log, result and image.

Each has a document and a journal in one folder, written from its start: so a node that was killed
can say afterwards what became of its builds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import orjson
import structlog
from google.protobuf.message import DecodeError

from offload_builder.node.imagefiles import ImageFiles
from offload_builder.node.journal import Journal
from offload_core.errors import OffloadError
from offload_core.smallfile import replace_small_file
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats
from offload_proto.v1.node_service_pb2 import Failure, Result

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.node.job import BuildJob
    from offload_cache.nodestore import NodeStore

log = structlog.get_logger(__name__)

INTERRUPTED = "the node was restarted while the build ran; start the build again"
SWEEP_SECONDS = 30.0
SAVED_KEEP_SECONDS = 30 * 86_400.0
"""How long it is known which image a build has made that the shared store keeps."""
SAVED_KEEP_BUILDS = 10_000


@dataclass(slots=True)
class EndedRecord:
    """What the disk says of a build.

    Attributes:
        build_id: the build.
        project_id: its project.
        member: who started it.
        result: serialised, in base64; empty while it runs.
        state: number of the BuildState that it ended with.
        error: for the history.
        ended_at: seconds since 1970.
        saved: the shared store is to keep its image.
        publication: number of the image's way there.
        stored: the shared store has the image.
        told: the gateway has its log and its end.
        network_policy: that it has brought, serialised, in base64; empty for none.
        names: of the image, normalised.
    """

    build_id: str
    project_id: str
    member: str
    result: str = ""
    state: int = 0
    error: str = ""
    ended_at: float = 0.0
    saved: bool = False
    told: bool = False
    publication: int = 0
    stored: bool = False
    network_policy: str = ""
    names: list[str] = field(default_factory=list)


class EndedBuild:
    """One build that has ended; what clients may still have of it."""

    def __init__(self, record: EndedRecord, result: Result, journal: Journal, image: ImageFiles):
        self.record = record
        self.build_id = record.build_id
        self.member = record.member
        self.project_id = record.project_id
        self.result: Result | None = result
        self.journal = journal
        self.image = image
        self.stats: BuildStats = result.stats
        self.over = asyncio.Event()
        self.over.set()
        self.held = ExitStack()
        """Keeps the image on the disk."""
        self.held_bytes = 0
        self._image_known = False
        self.visits = 0
        """Calls of clients that are open; it is kept for as long."""

    @property
    def image_digest(self) -> str:
        """Digest of the image; empty when there is none."""
        return self.result.success.image.digest if self.result is not None else ""

    @property
    def network_policy(self) -> bytes:
        """The policy that it has brought, serialised; empty for none."""
        return base64.b64decode(self.record.network_policy)

    async def know_image(self) -> None:
        """Find out what belongs to the image, unless that is known.

        Raises:
            NotFoundError: its manifest is out of reach.
        """
        if self._image_known or self.result is None:
            return
        if self.image_digest:
            await self.image.admit(self.image_digest)
        for layout in self.result.success.cache_layouts:
            await self.image.admit(layout.manifest.digest)
        self._image_known = True


class EndedBuilds:
    """The builds that a node keeps after their end, the oldest first.

    Args:
        folder: for documents and journals.
        store: of all projects.
        keep_seconds: how long a build is kept.
        keep_builds: how many at most.
        keep_bytes: of images that are held on the disk, of older ones what is left is given; and
            of logs.
    """

    def __init__(
        self,
        folder: Path,
        store: NodeStore,
        *,
        keep_seconds: float,
        keep_builds: int,
        keep_bytes: int,
    ) -> None:
        self._folder = folder
        self._store = store
        self._keep_seconds = keep_seconds
        self._keep_builds = keep_builds
        self._keep_bytes = keep_bytes
        self._builds: dict[str, EndedBuild] = {}

    def journal(self, build_id: str, project_id: str, member: str) -> Journal:
        """Begin the record of a build.

        Raises:
            OffloadError: the disk does not take it.
        """
        journal = Journal(self._path(build_id, "log"))
        self._write(EndedRecord(build_id, project_id, member))
        return journal

    def find(self, build_id: str) -> EndedBuild | None:
        """Return a build that is kept, or None."""
        return self._builds.get(build_id)

    def keep(
        self, job: BuildJob, result: Result, state: BuildState.ValueType, error: str
    ) -> EndedBuild:
        """Keep a build that has just ended, until `sweep` finds it too old."""
        record = EndedRecord(
            job.build_id,
            job.project_id,
            job.member,
            base64.b64encode(result.SerializeToString()).decode(),
            state,
            error[:4000],
            time.time(),
            saved=job.image_saved,
            publication=job.image.publication or 0,
            network_policy=base64.b64encode(job.network_policy).decode(),
            names=job.image_names,
        )
        ended = EndedBuild(record, result, job.journal, job.image)
        ended.stats = job.stats
        self._builds[job.build_id] = ended
        self._hold(ended)
        self._write(record)
        return ended

    def newest_image(self, project_id: str, member: str, name: str) -> str:
        """Return the digest of the image that a member has built last under a name, or ""."""
        return next(
            (
                ended.image_digest
                for ended in reversed(self._builds.values())
                if ended.image_digest
                and name in ended.record.names
                and (ended.record.project_id, ended.record.member) == (project_id, member)
            ),
            "",
        )

    def told(self, build_id: str) -> None:
        """Note that the gateway has the log and the end of a build."""
        ended = self._builds.get(build_id)
        if ended is not None and not ended.record.told:
            ended.record.told = True
            self._write(ended.record)

    def unsaved(self, build_id: str) -> EndedBuild | None:
        """Return a build whose image is on its way to the shared store, or None."""
        ended = self._builds.get(build_id)
        wanted = ended is not None and ended.record.saved and not ended.record.stored
        return ended if wanted else None

    def all_unsaved(self) -> list[EndedBuild]:
        """Return the builds whose images are on their way to the shared store."""
        return [item for item in self._builds.values() if self.unsaved(item.build_id)]

    def stored(self, ended: EndedBuild) -> None:
        """Note that the shared store has the image of a build."""
        ended.record.stored = True
        if self._builds.get(ended.build_id) is ended:
            self._write(ended.record)

    def drop(self, build_id: str) -> None:
        """Forget a build and everything that was kept of it."""
        ended = self._builds.pop(build_id, None)
        if ended is not None:
            ended.held.close()
            ended.journal.remove()
        for kind in ("json", "log"):
            self._path(build_id, kind).unlink(missing_ok=True)

    def sweep(self, is_busy: Callable[[str], bool]) -> None:
        """Release what is too old or too much, in the order in which the builds have ended.

        Args:
            is_busy: whether a build's record is still in use.
        """
        now = time.time()
        whole = [item for item in self._builds.values() if not item.journal.removed]
        spare = len(whole) - self._keep_builds
        excess = sum(item.journal.size_bytes for item in whole) - self._keep_bytes
        for number, ended in enumerate(whole):
            build_id, age = ended.build_id, now - ended.record.ended_at
            if is_busy(build_id) or ended.visits:
                continue
            if age <= self._keep_seconds and number >= spare and excess <= 0:
                continue
            excess -= ended.journal.size_bytes
            if ended.record.saved:
                # The image comes from the shared store from now on, and the gateway has the log.
                ended.held.close()
                ended.held_bytes = 0
                ended.journal.remove()
            else:
                self.drop(build_id)
                log.debug("build.record.released", build_id=build_id, age_seconds=round(age))
        # Of these only the image is known, so they take no room from others.
        lasting = [item for item in self._builds.values() if item.journal.removed]
        spare = len(lasting) - SAVED_KEEP_BUILDS
        for number, ended in enumerate(lasting):
            if is_busy(ended.build_id) or ended.visits:
                continue
            keep_seconds = SAVED_KEEP_SECONDS if ended.record.saved else self._keep_seconds
            if now - ended.record.ended_at > keep_seconds or number < spare:
                self.drop(ended.build_id)

    async def run(self, is_busy: Callable[[str], bool]) -> None:
        """Release what is too old, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep(is_busy)

    def close(self) -> None:
        """Close everything; the records stay on the disk."""
        for ended in self._builds.values():
            ended.held.close()
            ended.journal.close()
        self._builds.clear()

    # After a restart.

    async def restore(self) -> list[EndedBuild]:
        """Take up what a former process left; return what the gateway may not have heard of."""
        records = await asyncio.to_thread(self._read)
        records.sort(key=lambda record: record.ended_at or time.time())
        untold = []
        for record in records:
            try:
                ended = await self._restored(record)
            except (OffloadError, DecodeError, ValueError) as error:
                log.warning("build.record.lost", build_id=record.build_id, reason=str(error))
                self.drop(record.build_id)
                continue
            self._builds[record.build_id] = ended
            self._hold(ended)
            if not record.told:
                untold.append(ended)
        self.sweep(lambda build_id: not self._builds[build_id].record.told)
        return untold

    async def _restored(self, record: EndedRecord) -> EndedBuild:
        if record.result:
            result = Result.FromString(base64.b64decode(record.result))
        else:
            failure = Failure(kind=Failure.KIND_NODE, message=INTERRUPTED, node_lost=True)
            result = Result(failure=failure)
            record.state = BuildState.BUILD_STATE_LOST
            record.error = INTERRUPTED
            record.ended_at = time.time()
            record.result = base64.b64encode(result.SerializeToString()).decode()
            self._write(record)
        cache = await self._store.project(record.project_id)
        path, check = self._path(record.build_id, "log"), not record.told
        journal = await asyncio.to_thread(lambda: Journal.restored(path, check=check))
        ended = EndedBuild(record, result, journal, ImageFiles(cache.store))
        if not journal.removed:
            # Others are many, and their manifests may be far away. What is missing now is looked
            # for again when somebody asks for it.
            with contextlib.suppress(OffloadError):
                await ended.know_image()
        return ended

    def _read(self) -> list[EndedRecord]:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Results and output of builds are for the members who started them.
        self._folder.chmod(0o700)
        found: dict[str, EndedRecord] = {}
        for path in self._folder.glob("*.json"):
            try:
                record = EndedRecord(**orjson.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("build.record.damaged", path=str(path), reason=type(error).__name__)
                continue
            if record.build_id == path.stem:
                found[record.build_id] = record
        for path in self._folder.iterdir():
            if path.stem not in found or path.suffix not in (".json", ".log"):
                with contextlib.suppress(OSError):
                    path.unlink()
        return list(found.values())

    # The disk.

    def _hold(self, ended: EndedBuild) -> None:
        """Keep an image on the disk; older ones give way when together they are too large."""
        sizes = ended.image.sizes
        ended.held.enter_context(ended.image.store.lease(sizes))
        ended.held_bytes = sum(sizes.values())
        total = sum(item.held_bytes for item in self._builds.values())
        for item in self._builds.values():
            if total <= self._keep_bytes or item is ended:
                break
            total -= item.held_bytes
            item.held_bytes = 0
            item.held.close()

    def _path(self, build_id: str, kind: str) -> Path:
        return self._folder / f"{build_id}.{kind}"

    def _write(self, record: EndedRecord) -> None:
        try:
            replace_small_file(self._path(record.build_id, "json"), orjson.dumps(asdict(record)))
        except OSError as error:
            # The build goes on; only a restart would forget it.
            log.error("build.record.failed", build_id=record.build_id, error=str(error))
