"""Capabilities: what one build may do in the registry, under a name that nobody can guess."""

from __future__ import annotations

import contextlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_core.errors import AccessDeniedError, NotFoundError, QuotaExceededError

if TYPE_CHECKING:
    from offload_cache.blobwriter import BlobWriter
    from offload_cache.nodestore import ProjectCache

_CAPABILITY_BYTES = 24  # 192 bits; hex, because repository names are lower case
_MAX_UPLOADS = 64
_MAX_HELD_MANIFESTS = 64

CACHE = "cache"
IMAGE = "image"
IMPORT_TAG = "import"
EXPORT_TAG = "export"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a build may read and write.

    Attributes:
        cache: the build's project. A capability reads every blob of its project whose digest it
            knows: the project is what shares, and digests are verified, so this poisons nobody.
        read_scopes: cache scopes to import from, in order of preference.
        write_scope: scope that the exported cache manifest goes to; None forbids the export.
        entry_key: tells builds of one scope apart.
        build_id: noted in what is published.
        member: who runs the build; noted, too.
        may_import: False for a build without cache.
    """

    cache: ProjectCache
    read_scopes: tuple[str, ...]
    write_scope: str | None
    entry_key: str
    build_id: str
    member: str
    may_import: bool = True


@dataclass(frozen=True, slots=True)
class Exported:
    """One manifest that a build pushed.

    Attributes:
        repository: "cache" or "image".
        reference: the tag or digest under which it was pushed.
        digest: of the manifest.
        publication: number for `UploadQueue.wait_published`; None without a shared store.
    """

    repository: str
    reference: str
    digest: str
    publication: int | None


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
    writers: dict[tuple[str, str], BlobWriter] = field(default_factory=dict)
    tags: dict[str, dict[str, HeldManifest]] = field(default_factory=lambda: {CACHE: {}, IMAGE: {}})
    held: OrderedDict[tuple[str, str], HeldManifest] = field(default_factory=OrderedDict)
    exports: list[Exported] = field(default_factory=list)
    leased: set[str] = field(default_factory=set)
    leases: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    revoked: bool = False

    def lease(self, digest: str) -> None:
        """Keep a blob that this build uses on disk until the capability ends."""
        if digest not in self.leased and not self.revoked:
            self.leased.add(digest)
            self.leases.enter_context(self.grant.cache.store.lease([digest]))

    def hold(self, repository: str, manifest: HeldManifest) -> None:
        """Let a manifest be read by its digest, as clients do right after asking for a tag."""
        self.held[repository, manifest.digest] = manifest
        self.held.move_to_end((repository, manifest.digest))
        while len(self.held) > _MAX_HELD_MANIFESTS:
            self.held.popitem(last=False)

    def check_write(self, repository: str) -> None:
        """Refuse writes that the grant does not allow.

        Raises:
            AccessDeniedError: this build exports no cache.
        """
        if repository == CACHE and self.grant.write_scope is None:
            raise AccessDeniedError("this build may not write to the cache")

    def check_upload(self) -> None:
        """Refuse more uploads at a time than a client needs.

        Raises:
            QuotaExceededError: too many are open.
        """
        if len(self.writers) >= _MAX_UPLOADS:
            raise QuotaExceededError(f"more than {_MAX_UPLOADS} uploads are open at a time")


class Registry:
    """The capabilities in force. Used from one event loop."""

    def __init__(self) -> None:
        self._states: dict[str, GrantState] = {}

    def grant(self, grant: Grant) -> str:
        """Open two repositories, `<capability>/cache` and `<capability>/image`, for one build."""
        capability = secrets.token_hex(_CAPABILITY_BYTES)
        self._states[capability] = GrantState(grant)
        return capability

    async def revoke(self, capability: str) -> None:
        """Close a capability's repositories and end its uploads; fine when it is unknown."""
        state = self._states.pop(capability, None)
        if state is None:
            return
        state.revoked = True
        state.leases.close()
        while state.writers:
            _, writer = state.writers.popitem()
            await writer.abort()

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

    async def close(self) -> None:
        """Revoke everything."""
        for capability in list(self._states):
            await self.revoke(capability)
