"""What keeps blobs: contributions, images and leases, read from the shared store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson
import structlog
import zstandard

from offload_cache.collection.documents import (
    MAX_DOCUMENT_BYTES,
    LeaseDocument,
    UnknownDocumentError,
    read_document,
)
from offload_cache.collection.snapshot import ProjectSnapshot, read_roots_snapshot
from offload_cache.collection.timing import LEASE_SECONDS
from offload_cache.contributions import MAX_CONTRIBUTION_BYTES, Contribution, Writer
from offload_cache.images import MAX_IMAGE_BYTES, ImageDocument
from offload_cache.keys import contribution_key, removed_image_key
from offload_core.aio import for_each
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from offload_cache.objectstore import ObjectInfo, ObjectStore

_log = structlog.get_logger(__name__)

_PARALLEL_READS = 4
_KNOWN_VERSIONS = {2}


@dataclass(frozen=True, slots=True)
class Root:
    """One contribution, image or stored cache mount, without its records.

    Attributes:
        scope: of a contribution or mount; empty for an image.
        name: of a contribution or mount; of an image the digest of its manifest.
        key: entry key of a contribution.
        blobs: digests and sizes in bytes.
        written_at: by the store's clock.
        writer: who wrote it; of an image only the build is known.
    """

    scope: str
    name: str
    key: str
    blobs: tuple[tuple[str, int], ...]
    written_at: datetime
    writer: Writer
    is_mount: bool = False

    @property
    def is_image(self) -> bool:
        """Whether this is an image."""
        return not self.scope

    @property
    def is_contribution(self) -> bool:
        """Whether this is what a build added to a scope."""
        return not (self.is_image or self.is_mount)


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that was found.

    Attributes:
        key: of its object.
        document: what it names.
        until: when it ends, by the store's clock.
    """

    key: str
    document: LeaseDocument
    until: datetime


@dataclass(slots=True)
class ProjectRoots:
    """All roots of a project.

    Attributes:
        live: contributions, images and cache mounts.
        removed: those that were removed, but whose copies are still there.
        leases: whether they count still or not.
        problems: documents that a later release wrote; while there are any, nothing may be deleted.
        damaged: keys of documents that nobody can read.
    """

    live: list[Root] = field(default_factory=list)
    removed: list[Root] = field(default_factory=list)
    leases: list[HeldLease] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damaged: list[ObjectInfo] = field(default_factory=list)

    def marks(self, now: datetime, grace: timedelta) -> set[str]:
        """Return the digests of all blobs that must stay."""
        marked: set[str] = set()
        leased = self.leased_contributions(now)
        for root in self.live:
            marked.update(digest for digest, _ in root.blobs)
        for root in self.removed:
            if root.written_at + grace > now or (root.scope, root.name) in leased:
                marked.update(digest for digest, _ in root.blobs)
        return marked | self.leased_digests(now)

    def leased_digests(self, now: datetime) -> set[str]:
        """Return what leases name that still count."""
        return {
            digest
            for lease in self.leases
            if lease.until > now
            for digest in lease.document.digests
        }

    def leased_contributions(self, now: datetime) -> set[tuple[str, str]]:
        """Return scope and name of contributions that leases name which still count."""
        return {
            name
            for lease in self.leases
            if lease.until > now
            for name in lease.document.contributions
        }


class RootReader:
    """Reads documents of projects; what cannot change is read once for as long as it is there."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._known: dict[str, dict[tuple[str, str], Root]] = {}
        self._digests: dict[str, str] = {}

    async def read(self, snapshot: ProjectSnapshot) -> ProjectRoots:
        """Read all documents that a listing shows.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        roots = ProjectRoots()
        await self._read_leases(snapshot.leases, roots)
        await self._read_documents(snapshot, roots)
        project = self._known.get(snapshot.project_id, {})
        names = {*snapshot.contributions, *snapshot.removed}
        names |= {("", digest) for digest in (*snapshot.images, *snapshot.removed_images)}
        self._known[snapshot.project_id] = {name: project[name] for name in names & project.keys()}
        return roots

    async def read_again(self, project_id: str) -> tuple[ProjectSnapshot, ProjectRoots]:
        """List and read all roots, so that nothing which is on the move is missed.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        roots = ProjectRoots()
        snapshot = await read_roots_snapshot(
            self._objects, project_id, lambda leases: self._read_leases(leases, roots)
        )
        await self._read_documents(snapshot, roots)
        return snapshot, roots

    def forget(self, project_ids: Iterable[str]) -> None:
        """Drop what is remembered of all other projects."""
        self._known = {name: self._known[name] for name in project_ids if name in self._known}
        self._digests = {
            digest: digest
            for project in self._known.values()
            for root in project.values()
            for digest, _ in root.blobs
        }

    async def _read_leases(self, found: Sequence[ObjectInfo], roots: ProjectRoots) -> None:
        async def read(info: ObjectInfo) -> None:
            try:
                data = await self._objects.read_bytes(info.key, max_bytes=MAX_DOCUMENT_BYTES)
                document = LeaseDocument.from_bytes(data)
            except NotFoundError:
                return  # given up since the listing: its document is there
            except UnknownDocumentError as error:
                roots.problems.append(f"{info.key}: {error}")
                return
            except UsageError:
                roots.problems.append(f"{info.key}: a lease is damaged")
                document = LeaseDocument("", LEASE_SECONDS)
            until = info.modified_at + timedelta(seconds=document.seconds)
            roots.leases.append(HeldLease(info.key, document, until))

        await for_each(found, read, parallel=_PARALLEL_READS)

    async def _read_documents(self, snapshot: ProjectSnapshot, roots: ProjectRoots) -> None:
        live = roots.live
        project_id = snapshot.project_id

        async def contribution(item: tuple[tuple[str, str], ObjectInfo]) -> None:
            name, info = item
            moved = contribution_key(project_id, *name, kind="removed")
            await self._take(project_id, name, info, moved, live, roots)

        async def removed(item: tuple[tuple[str, str], ObjectInfo]) -> None:
            name, info = item
            await self._take(project_id, name, info, "", roots.removed, roots)

        async def image(item: tuple[str, ObjectInfo]) -> None:
            digest, info = item
            moved = removed_image_key(project_id, digest)
            await self._take(project_id, ("", digest), info, moved, live, roots)

        async def mount(item: tuple[tuple[str, str], ObjectInfo]) -> None:
            # Written over and over, so it is read each time.
            name, info = item
            data = await self._document(info.key, "")
            if data is not None:
                self._parse_into(
                    lambda: self._mount(name, data, info.modified_at), info, live, roots
                )

        async def removed_image(item: tuple[str, ObjectInfo]) -> None:
            digest, info = item
            await self._take(project_id, ("", digest), info, "", roots.removed, roots)

        await for_each(snapshot.contributions.items(), contribution, parallel=_PARALLEL_READS)
        await for_each(snapshot.images.items(), image, parallel=_PARALLEL_READS)
        await for_each(snapshot.mounts.items(), mount, parallel=_PARALLEL_READS)
        await for_each(snapshot.removed.items(), removed, parallel=_PARALLEL_READS)
        await for_each(snapshot.removed_images.items(), removed_image, parallel=_PARALLEL_READS)

    async def _take(
        self,
        project_id: str,
        name: tuple[str, str],
        info: ObjectInfo,
        moved: str,
        into: list[Root],
        roots: ProjectRoots,
    ) -> None:
        known = self._known.setdefault(project_id, {})
        root = known.get(name)
        if root is not None and root.is_image and root.written_at != info.modified_at:
            root = None  # pushed again, and this time it may name more
        if root is None:
            data = await self._document(info.key, moved)
            if data is None:
                return  # its time after the removal is over, too
            root = self._parse_into(
                lambda: self._parse(name, data, info.modified_at), info, into, roots
            )
            if root is not None:
                known[name] = root
            return
        if root.written_at != info.modified_at:
            root = replace(root, written_at=info.modified_at)
        into.append(root)

    @staticmethod
    def _parse_into(
        parse: Callable[[], Root], info: ObjectInfo, into: list[Root], roots: ProjectRoots
    ) -> Root | None:
        """Add what a document says, or note what is wrong with it."""
        try:
            root = parse()
        except UnknownDocumentError as error:
            roots.problems.append(f"{info.key}: {error}")
            return None
        except UsageError as error:
            _log.warning("cache.document.damaged", key=info.key, cause=error.message)
            roots.damaged.append(info)
            return None
        into.append(root)
        return root

    async def _document(self, key: str, moved: str) -> bytes | None:
        for candidate in (key, moved):
            try:
                if candidate:
                    return await self._objects.read_bytes(
                        candidate, max_bytes=max(MAX_CONTRIBUTION_BYTES, MAX_IMAGE_BYTES)
                    )
            except NotFoundError:
                continue
        return None

    def _parse(self, name: tuple[str, str], data: bytes, written_at: datetime) -> Root:
        if not name[0]:
            image = ImageDocument.from_bytes(data)
            writer = Writer(image.build_id, "", "")
            return Root("", name[1], "", self._intern(image.blobs), written_at, writer)
        try:
            document = Contribution.from_bytes(data)
        except UsageError as error:
            version = _version(data)
            if version is not None and version not in _KNOWN_VERSIONS:
                raise UnknownDocumentError(error.message) from error
            raise
        blobs = self._intern(document.blobs)
        return Root(*name, document.key, blobs, written_at, document.writer)

    def _mount(self, name: tuple[str, str], data: bytes, written_at: datetime) -> Root:
        raw = read_document(data, "document of a cache mount")
        try:
            blobs = [(str(blob["digest"]), int(blob["size"])) for blob in raw["blobs"]]
            writer = Writer(str(raw["build_id"]), "", "", str(raw["node"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError("the document of a cache mount is damaged") from error
        return Root(*name, "", self._intern(blobs), written_at, writer, is_mount=True)

    def _intern(self, blobs: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        # Most contributions name the layers of others: one text for each digest.
        return tuple((self._digests.setdefault(digest, digest), size) for digest, size in blobs)


def _version(data: bytes) -> Any:
    try:
        return orjson.loads(zstandard.ZstdDecompressor().decompress(data))["version"]
    except (orjson.JSONDecodeError, zstandard.ZstdError, KeyError, TypeError):
        return None
