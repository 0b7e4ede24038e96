"""One project's base images: what a name means now, and whether the pool may read it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.mirror.content import BaseContent
from offload_cache.mirror.errors import (
    AwayError,
    DeniedError,
    MissingError,
    UnfitError,
    UpstreamError,
)
from offload_cache.mirror.flights import Flights
from offload_cache.mirror.names import KnownName, NameTable
from offload_cache.mirror.roots import BaseRoots
from offload_core.aio import TaskSet
from offload_core.digest import is_digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from offload_cache.database import CacheDatabase
    from offload_cache.mirror.content import BaseManifest
    from offload_cache.mirror.upstream import Upstream
    from offload_cache.tiered import ProjectStore

_log = structlog.get_logger(__name__)

_DENIED_SECONDS = 60.0
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class BasePolicy:
    """When upstream registries are asked.

    Attributes:
        recheck_seconds: what a tag means, and whether the pool may read a repository, is asked
            again after so long.
        stale_seconds: for so long the last answer holds while the registry does not answer.
    """

    recheck_seconds: float = 300.0
    stale_seconds: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a repository was last not served, and when."""

    repository: str
    cause: str
    denied: bool
    at: float

    def __str__(self) -> str:
        """A sentence for people."""
        if not self.denied:
            return self.cause
        host = self.repository.partition("/")[0]
        return (
            f"the pool may not read {self.repository} ({self.cause}); check the name and, if the"
            f" image is private, log in with `docker login {host}`"
        )


class BaseImages:
    """An async context manager; `MirrorHandlers` and the node's builds use it.

    A repository is served as long as the pool's own login, or none, can read it upstream. What
    needs the login of a person is refused here, so that BuildKit asks the registry itself, with
    that login, and nothing of it is kept.

    Args:
        store: of the project.
        database: the node's index.
        upstreams: by host; images of other hosts are refused.
        policy: when to ask.
    """

    def __init__(
        self,
        store: ProjectStore,
        database: CacheDatabase,
        upstreams: Mapping[str, Upstream],
        policy: BasePolicy,
    ) -> None:
        self.store = store
        self._upstreams = upstreams
        self._policy = policy
        self._tasks = TaskSet(self._crashed)
        self._names = NameTable(database, store.project_id)
        self._content = BaseContent(store, self._tasks)
        self._roots = BaseRoots(store, self._names, self._content, self._tasks)
        self._lookups: Flights[tuple[str, str], KnownName] = Flights(self._tasks, "look up base")
        self._proofs: Flights[str, None] = Flights(self._tasks, "check base")
        self._readable: dict[str, float] = {}
        self._troubles: dict[str, Trouble] = {}
        self._recheck_from = 0.0

    async def __aenter__(self) -> Self:
        await self._names.open()
        # Names of branches and commits come and go; what may not even be used stale is dropped.
        await self._names.expire(time.time() - self._policy.stale_seconds)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        # Those who wait for a flight get its error themselves.
        if not isinstance(error, UpstreamError):
            _log.warning("base_images.task.failed", task=name, error=repr(error))

    def recheck(self) -> None:
        """Ask upstream for every name that is used from now on: a build with `--pull` begins."""
        self._recheck_from = time.time()
        self._troubles.clear()

    def explain(self, message: str) -> Trouble | None:
        """Return why an image in BuildKit's message was not found; None when nothing is known.

        BuildKit tells of the first registry that it asked, which is this mirror, and not of what
        the image's own registry answered.
        """
        now = time.time()
        for repository, trouble in self._troubles.items():
            named = f"{repository}:" in message or f"{repository}@" in message
            if named and now - trouble.at < _DENIED_SECONDS:
                return trouble
        return None

    # -- what the mirror serves

    async def resolve(self, host: str, name: str, reference: str) -> BaseManifest:
        """Return the manifest that a tag means now, or that a Dockerfile names by digest.

        Raises:
            UpstreamError: it is not served, for whatever reason.
            QuotaExceededError: the disk is full.
        """
        upstream, repository = self._upstream(host), f"{host}/{name}"
        known = await self._lookups.join(
            (repository, reference), lambda: self._known(upstream, name, reference)
        )
        return await self._read_manifest(upstream, name, known.digest)

    async def manifest(self, host: str, name: str, digest: str) -> BaseManifest:
        """Return a manifest by its digest.

        Raises:
            UpstreamError: it is not served, for whatever reason.
            QuotaExceededError: the disk is full.
        """
        upstream = self._upstream(host)
        await self._check_readable(upstream, name, lambda: upstream.find_manifest(name, digest))
        return await self._read_manifest(upstream, name, digest)

    async def _read_manifest(self, upstream: Upstream, name: str, digest: str) -> BaseManifest:
        repository = f"{upstream.host}/{name}"
        try:
            return await self._content.manifest(upstream, name, digest)
        except UpstreamError as error:
            self._note_trouble(repository, error)
            raise
        finally:
            self._roots.changed(repository)

    async def blob(self, host: str, name: str, digest: str) -> Path:
        """Return the path of a verified blob.

        Raises:
            UpstreamError: it is not served, for whatever reason.
            NotFoundError: the disk is too small for it.
            QuotaExceededError: the disk is full.
        """
        upstream, repository = self._upstream(host), f"{host}/{name}"
        await self._check_readable(upstream, name, lambda: upstream.find_blob(name, digest))
        try:
            return await self._content.blob(upstream, name, digest)
        except UpstreamError as error:
            self._note_trouble(repository, error)
            raise
        finally:
            self._roots.changed(repository)

    async def blob_size(self, host: str, name: str, digest: str) -> int:
        """Return the bytes of a blob without pulling it.

        Raises:
            UpstreamError: it is not served, for whatever reason.
        """
        upstream = self._upstream(host)
        await self._check_readable(upstream, name, lambda: upstream.find_blob(name, digest))
        size_bytes = await self.store.stat_blob(digest)
        return size_bytes or await upstream.find_blob(name, digest)

    def _upstream(self, host: str) -> Upstream:
        upstream = self._upstreams.get(host)
        if upstream is None:
            raise MissingError(f"images of {host} are not cached here")
        return upstream

    # -- names

    async def _known(self, upstream: Upstream, name: str, reference: str) -> KnownName:
        """Return what a tag or digest means; a digest means itself, if the pool may read it."""
        repository = f"{upstream.host}/{name}"
        self._refuse_denied(repository)
        known = await self._names.get(repository, reference)
        if known is not None and self._is_recent(known.checked_at):
            return known
        self.store.statistics.base_checks += 1
        try:
            digest = await upstream.find_manifest(name, reference)
        except AwayError as error:
            return await self._stale(repository, reference, known, error)
        except UpstreamError as error:
            self._note_trouble(repository, error)
            await self._names.forget(repository, reference)
            if isinstance(error, DeniedError):
                self._readable.pop(repository, None)
                await self._names.forget(repository)
            raise
        if is_digest(reference) and digest != reference:
            raise UnfitError(f"{repository} answers {digest} for {reference}")
        moved = known is not None and known.digest != digest
        if moved:
            _log.info("base_images.tag.moved", name=f"{repository}:{reference}", digest=digest)
        noted_at = known.noted_at if known is not None and not moved else 0.0
        known = KnownName(repository, reference, digest, time.time(), noted_at)
        await self._names.put(known)
        self._proved(repository)
        return known

    async def _stale(
        self, repository: str, reference: str, known: KnownName | None, error: AwayError
    ) -> KnownName:
        if known is None:
            known = await self._roots.meaning(repository, reference)
        age = time.time() - known.checked_at if known is not None else 0.0
        if known is None or age > self._policy.stale_seconds:
            self._note_trouble(repository, error)
            raise error
        self.store.statistics.base_stale_answers += 1
        _log.warning(
            "base_images.stale",
            project_id=self.store.project_id,
            name=known.name,
            digest=known.digest,
            checked_seconds_ago=round(age),
            cause=str(error),
        )
        await self._names.put(known)
        return known

    def _is_recent(self, checked_at: float) -> bool:
        # A clock that was set back must not make an answer last for ever.
        age = time.time() - checked_at
        return checked_at >= self._recheck_from and 0 <= age < self._policy.recheck_seconds

    # -- rights

    async def _check_readable(
        self, upstream: Upstream, name: str, probe: Callable[[], Awaitable[object]]
    ) -> None:
        """Refuse a repository that the pool cannot read.

        Raises:
            UpstreamError: it cannot, or that cannot be learnt.
        """
        repository = f"{upstream.host}/{name}"
        self._refuse_denied(repository)
        checked_at = self._readable.get(repository, 0.0)
        # With `--pull`, names are asked for again; a right that was just proved still holds.
        if not 0 <= time.time() - checked_at < self._policy.recheck_seconds:
            await self._proofs.join(repository, lambda: self._prove(repository, probe))

    async def _prove(self, repository: str, probe: Callable[[], Awaitable[object]]) -> None:
        try:
            await probe()
        except AwayError as error:
            known = await self._names.of_repository(repository, 1)
            newest = known[0].checked_at if known else 0.0
            if time.time() - newest <= self._policy.stale_seconds:
                return
            self._note_trouble(repository, error)
            raise
        except UpstreamError as error:
            self._note_trouble(repository, error)
            raise
        self._proved(repository)

    def _proved(self, repository: str) -> None:
        if len(self._readable) >= _MAX_REMEMBERED:
            self._readable.clear()
        self._readable[repository] = time.time()
        self._troubles.pop(repository, None)

    def _refuse_denied(self, repository: str) -> None:
        trouble = self._troubles.get(repository)
        if trouble is not None and trouble.denied and time.time() - trouble.at < _DENIED_SECONDS:
            raise DeniedError(trouble.cause)

    def _note_trouble(self, repository: str, error: UpstreamError) -> None:
        if isinstance(error, MissingError):
            return  # the image's own registry says the same
        if len(self._troubles) >= _MAX_REMEMBERED:
            self._troubles.clear()
        self._troubles[repository] = Trouble(
            repository, str(error), isinstance(error, DeniedError), time.time()
        )
        _log.info(
            "base_images.refused",
            project_id=self.store.project_id,
            repository=repository,
            cause=str(error),
        )
