"""Capabilities: what one build may do in the registry, under a name that nobody can guess."""

from __future__ import annotations

import contextlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from offload_cache.registry.links import ImageLinks
from offload_cache.registry.responses import UNKNOWN_NAME, RegistryError
from offload_core.errors import AccessDeniedError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiohttp import web

    from offload_cache.contributions import Writer
    from offload_cache.nodestore import ProjectCache
    from offload_cache.registry.sessions import UploadSession

_log = structlog.get_logger(__name__)

_CAPABILITY_BYTES = 96
CAPABILITY_CHARACTERS = 2 * _CAPABILITY_BYTES
"""Hexadecimal, because repository names are lower case.

24 bytes would be secret enough. But BuildKit notes at each import, for every listed layer that it
has, which repositories had it: one write with fsync each, 1 ms on a plain disk, until the note is
full with 4,096 bytes. With long names it soon is. Older clients, such as docker 20.10, take no more
than 255 bytes together with host and port.
Source: containerd's core/remotes/docker/handler.go, AppendDistributionSourceLabel.
"""
_MAX_UPLOADS = 64
_MAX_HELD_MANIFESTS = 64
_MAX_HELD_BYTES = 32 << 20
_MAX_EXPORTS = 20_000

CACHE = "cache"
IMAGE = "image"
IMPORT_TAG = "import"
EXPORT_TAG = "export"


class KnownResults(Protocol):
    """What a BuildKit has without an import."""

    def hold_all(self, contributions: Iterable[str]) -> bool:
        """Return whether an import of these contributions would give it nothing."""
        ...

    def imported(self) -> None:
        """Hear that it is about to read an import."""
        ...


@dataclass(frozen=True, slots=True)
class Grant:
    """What a build may read and write.

    Attributes:
        cache: the build's project. A capability reads every blob of its project whose digest it
            knows: the project is what shares, and digests are verified, so this poisons nobody.
        read_scopes: cache scopes to import from, in order of preference.
        write_scope: scope that the exported cache manifest goes to; None forbids the export.
        entry_key: tells builds of one scope apart.
        writer: which build of whom; noted in what is published.
        may_import: False for a build without cache.
        results: of the BuildKit that the build runs on; None when nothing is known of them.
        may_push: False for who only reads.
    """

    cache: ProjectCache
    read_scopes: tuple[str, ...]
    write_scope: str | None
    entry_key: str
    writer: Writer
    may_import: bool = True
    results: KnownResults | None = None
    may_push: bool = True


@dataclass(frozen=True, slots=True)
class Exported:
    """One manifest that a build pushed.

    Attributes:
        repository: "cache" or "image".
        reference: the tag or digest under which it was pushed.
        digest: of the manifest.
        publication: number for `UploadQueue.wait_published`; None without a shared store.
        contribution: identifier of what it added to the cache; empty when it added nothing.
    """

    repository: str
    reference: str
    digest: str
    publication: int | None
    contribution: str = ""


@dataclass(frozen=True, slots=True)
class HeldManifest:
    """A manifest that a capability can read again by its digest."""

    body: bytes
    digest: str
    media_type: str


@dataclass(slots=True)
class GrantState:
    """A capability's uploads, tags and leases; ends with `Registry.revoke`."""

    grant: Grant
    uploads: dict[tuple[str, str], UploadSession] = field(default_factory=dict)
    image: ImageLinks = field(default_factory=ImageLinks)
    cache_tags: dict[str, str] = field(default_factory=dict)
    held: OrderedDict[tuple[str, str], HeldManifest] = field(default_factory=OrderedDict)
    exports: list[Exported] = field(default_factory=list)
    leased: set[str] = field(default_factory=set)
    kept_shared: set[str] = field(default_factory=set)
    leases: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    revoked: bool = False

    def lease(self, digest: str) -> None:
        """Keep a blob that this build uses on disk until the capability ends."""
        if digest not in self.leased and not self.revoked:
            self.leased.add(digest)
            self.leases.enter_context(self.grant.cache.store.lease([digest]))

    def keep_shared(self, digests: Iterable[str]) -> None:
        """Keep blobs that this build may read in the shared store until the capability ends."""
        cache = self.grant.cache
        if cache.read_lease is None or self.revoked:
            return
        # Once each, however often a client asks.
        if new := set(digests) - self.kept_shared:
            self.kept_shared |= new
            self.leases.enter_context(cache.read_lease.reading(cache.store.project_id, digests=new))

    def hold(self, repository: str, manifest: HeldManifest) -> None:
        """Let a manifest be read by its digest, as clients do right after asking for a tag."""
        self.held[repository, manifest.digest] = manifest
        self.held.move_to_end((repository, manifest.digest))
        held_bytes = sum(len(held.body) for held in self.held.values())
        while len(self.held) > 1 and (
            len(self.held) > _MAX_HELD_MANIFESTS or held_bytes > _MAX_HELD_BYTES
        ):
            _, dropped = self.held.popitem(last=False)
            held_bytes -= len(dropped.body)

    def check_write(self, repository: str) -> None:
        """Refuse writes that the grant does not allow.

        Raises:
            AccessDeniedError: this build exports no cache, or nothing at all.
        """
        if not self.grant.may_push:
            raise AccessDeniedError("this repository can only be read")
        if repository == CACHE and self.grant.write_scope is None:
            raise AccessDeniedError("this build may not write to the cache")

    def check_upload(self) -> None:
        """Refuse more uploads at a time than a client needs, and any after the build's end.

        Raises:
            RegistryError: too many are open, or the capability was revoked.
        """
        if self.revoked:  # while its request waited: nobody would end this upload
            raise RegistryError(*UNKNOWN_NAME)
        if len(self.uploads) >= _MAX_UPLOADS:
            raise RegistryError(
                429, "TOOMANYREQUESTS", f"more than {_MAX_UPLOADS} uploads are open at a time"
            )

    def check_push(self, repository: str) -> None:
        """Refuse a manifest that the grant does not allow, or one of far too many.

        Raises:
            AccessDeniedError: this build exports no cache.
            RegistryError: too many were pushed.
        """
        self.check_write(repository)
        if len(self.exports) >= _MAX_EXPORTS:
            raise RegistryError(
                429, "TOOMANYREQUESTS", f"a build may push {_MAX_EXPORTS} manifests"
            )

    async def end_expired_uploads(self) -> None:
        """End the uploads that their clients have left, or take too long for."""
        for key, upload in list(self.uploads.items()):
            if upload.expired and self.uploads.pop(key, None) is not None:
                _log.info(
                    "blob.upload.expired",
                    build_id=self.grant.writer.build_id,
                    received_bytes=upload.writer.size_bytes,
                )
                await upload.writer.abort()


class Registry:
    """The capabilities in force. Used from one event loop."""

    def __init__(self) -> None:
        self._states: dict[str, GrantState] = {}

    def grant(self, grant: Grant) -> str:
        """Open two repositories, `<capability>/cache` and `<capability>/image`, for one build."""
        capability = secrets.token_hex(_CAPABILITY_BYTES)
        self._states[capability] = GrantState(grant)
        return capability

    def capabilities(self) -> list[str]:
        """Return those in force, for who must keep them out of what people see."""
        return list(self._states)

    async def revoke(self, capability: str) -> None:
        """Close a capability's repositories and end its uploads; fine when it is unknown."""
        state = self._states.pop(capability, None)
        if state is None:
            return
        state.revoked = True
        state.leases.close()
        while state.uploads:
            _, upload = state.uploads.popitem()
            await upload.writer.abort()

    def exports(self, capability: str) -> list[Exported]:
        """Return what a build pushed so far, in order.

        Raises:
            NotFoundError: the capability is unknown or was revoked.
        """
        return list(self.state(capability).exports)

    def state(self, capability: str) -> GrantState:
        """Return what a capability may do.

        Raises:
            NotFoundError: it is unknown or was revoked.
        """
        # A dict look-up of a 192-bit secret: its timing tells nothing useful.
        state = self._states.get(capability)
        if state is None:
            raise NotFoundError("there is no such repository")
        return state

    def requested(self, request: web.Request) -> tuple[GrantState, str]:
        """Return the capability and the repository of a request.

        Raises:
            RegistryError: the capability is unknown or was revoked.
        """
        info = request.match_info
        try:
            return self.state(info["capability"]), info["repository"]
        except NotFoundError:
            raise RegistryError(*UNKNOWN_NAME) from None

    async def end_expired_uploads(self) -> None:
        """End all uploads that came to a halt."""
        for state in list(self._states.values()):
            await state.end_expired_uploads()

    async def close(self) -> None:
        """Revoke everything."""
        for capability in list(self._states):
            await self.revoke(capability)
