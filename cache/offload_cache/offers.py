"""What a build is given to import: one cache manifest that lists only layers it can really get."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.manifests import OCI_MANIFEST
from offload_cache.unified import Unifier
from offload_core.aio import TaskSet
from offload_core.digest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence
    from concurrent.futures import ThreadPoolExecutor
    from typing import Any

    from offload_cache.scopes import ScopeIndex
    from offload_cache.tiered import ProjectStore
    from offload_cache.unified import UnifiedImport
    from offload_cache.unify import Limits

_log = structlog.get_logger(__name__)

_REFRESH_SECONDS = 5.0
_IN_USE_SECONDS = 600.0
_STALE_SECONDS = 30.0
_NEWS_SECONDS = 0.5
_UNKNOWN_WAIT_SECONDS = 2.0
_STALE_WAIT_SECONDS = 0.25
_NEWS_WAIT_SECONDS = 0.02
_RENEW_SECONDS = 5.0
_MISSING_SECONDS = 60.0
_AGED_SECONDS = 2 * 3600.0
"""After so long what is known of layers must be looked through again, or it fades unnoticed."""
_MAX_VIEWS = 64


@dataclass(frozen=True, slots=True)
class Offer:
    """A cache manifest as it is served.

    Attributes:
        body: the manifest; its configuration blob is on this node's disk.
        digest: of `body`.
        media_type: of `body`.
        config_digest: of the blob with the records.
        contributions: identifiers of those in it, in order of preference.
        own_key: whether one of them is of a build with the same key.
        layers: digests of the layers that it lists.
        listed: how many these are.
        withheld: layers that it does not list because their blobs are not to be had.
        records: cache records in it.
    """

    body: bytes
    digest: str
    media_type: str
    config_digest: str
    contributions: tuple[str, ...]
    own_key: bool
    layers: frozenset[str]
    listed: int
    withheld: int
    records: int


@dataclass(slots=True)
class _View:
    """What is ready for one set of scopes and one key.

    `wanted` counts the reasons to make it anew, `made` those that `ready` has seen.
    """

    scopes: tuple[str, ...]
    key: str
    ready: UnifiedImport | None = None
    wanted: int = 1
    made: int = 0
    made_at: float = 0.0
    asked_at: float = 0.0
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def current(self) -> bool:
        return self.made >= self.wanted


class OfferDesk:
    """Renders the one manifest that a build imports; an async context manager.

    Importing several manifests does not unite them in BuildKit (docs/adr/0005-one-import.md), so
    it is done here, in the background whenever a contribution comes or goes. A request only looks
    which layers can be had.

    Args:
        store: the project's blobs.
        scopes: the project's contributions; closed after the desk.
        executor: for the heavy work.
        limits: bounds of an import.
    """

    def __init__(
        self,
        store: ProjectStore,
        scopes: ScopeIndex,
        executor: ThreadPoolExecutor,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._scopes = scopes
        self._unifier = Unifier(store, scopes, executor, limits)
        self._views: OrderedDict[tuple[tuple[str, ...], str], _View] = OrderedDict()
        self._refreshing: dict[str, asyncio.Task[bool]] = {}
        self._loop_running = False
        self._tasks = TaskSet(on_error=self._crashed)
        scopes.on_change(self._changed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()
        self._views.clear()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("cache.offer.task_failed", task=name, error=repr(error))

    async def offer(
        self,
        read_scopes: Sequence[str],
        key: str,
        *,
        after_fault: bool = False,
        patient: bool = True,
    ) -> Offer | None:
        """Return the manifest to import now, None when the scopes have nothing that can be had.

        It is what is ready. The shared store is waited for at most 2 s by a node that knows
        nothing of the scopes, at most 0.25 s by one that knows nothing of the key or has not asked
        for half a minute, and else for 20 ms, which a near store needs to tell what is new.

        Args:
            read_scopes: scopes to import from, the most preferred first.
            key: of the build; contributions of equal builds go first when not all fit.
            after_fault: a build has just failed on what was offered; unite anew without it first.
            patient: wait for news also where the build and its scopes are known; else ask for them.
        """
        view = self._view(tuple(read_scopes), key)
        await self._scopes.load(view.scopes)
        await self._wait_for_shared(view, patient=patient)
        aged = view.ready is not None and time.monotonic() - view.made_at > _AGED_SECONDS
        if after_fault or aged:
            view.wanted += 1
        empty = view.ready is None or not view.ready.rendered.layers
        if after_fault or aged or (empty and not view.current):
            await self._renewed(view, _RENEW_SECONDS)
        elif not view.current:
            self._start(self._renew(view), "unify")
        # The disk keeps what is in use; what nobody imported for long may be trimmed.
        if view.ready is not None and not self._store.disk.has(view.ready.rendered.config_digest):
            view.wanted += 1
            await self._renewed(view, _RENEW_SECONDS)
        offer = None if view.ready is None else self._serve(view.ready)
        promised = view.ready is not None and bool(view.ready.rendered.layers)
        if promised and view.current and (offer is None or offer.withheld):
            # Another builder's result may be whole.
            view.wanted += 1
            self._start(self._renew(view), "unify")
        return offer

    def awaits_news(self, read_scopes: Iterable[str]) -> bool:
        """Return whether the shared store may have something new of these scopes."""
        return bool(self._stale(read_scopes))

    def expect(self) -> None:
        """Hear that a build is on its way here: ask for news of the scopes that builds use."""
        for scope in self._stale({scope for view in self._in_use() for scope in view.scopes}):
            self._refresh(scope)

    def _view(self, read_scopes: tuple[str, ...], key: str) -> _View:
        name = (read_scopes, key)
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = _View(read_scopes, key)
            while len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(name)
        view.asked_at = time.monotonic()
        if not self._loop_running:
            self._loop_running = True
            self._start(self._keep_fresh(), "refresh scopes")
        return view

    def _serve(self, ready: UnifiedImport) -> Offer | None:
        store, rendered = self._store, ready.rendered
        shared = store.presence if store.objects is not None and store.objects.reachable else None
        keep = {
            digest
            for digest in rendered.layers
            # The memory first: the disk costs a system call for each layer.
            if (shared is not None and shared.is_present(digest)) or store.is_offerable(digest)
        }
        if not keep:
            return None
        body, digest = ready.body, ready.digest
        if len(keep) < len(rendered.layers):
            body = rendered.manifest(keep)
            digest = sha256_digest(body)
        return Offer(
            body=body,
            digest=digest,
            media_type=OCI_MANIFEST,
            config_digest=rendered.config_digest,
            contributions=ready.contributions,
            own_key=ready.own_key,
            layers=frozenset(keep),
            listed=len(keep),
            withheld=len(rendered.layers) - len(keep),
            records=rendered.record_count,
        )

    # -- the shared store

    def _stale(self, scopes: Iterable[str]) -> list[str]:
        """Return the scopes that a reachable store was not asked about for a moment."""
        objects = self._store.objects
        if objects is None or not objects.reachable:
            return []
        return [scope for scope in scopes if self._scopes.listing_age(scope) > _NEWS_SECONDS]

    async def _wait_for_shared(self, view: _View, *, patient: bool) -> None:
        stale = self._stale(view.scopes)
        if not stale:
            return
        members = [member for scope in view.scopes for member in self._scopes.members(scope)]
        age = max(map(self._scopes.listing_age, stale))
        if not members:
            wait_seconds = _UNKNOWN_WAIT_SECONDS
        elif age > _STALE_SECONDS or not any(m.key == view.key for m in members):
            # A build of which nothing is known has more to lose by old news than by a short wait.
            wait_seconds = _STALE_WAIT_SECONDS
        else:
            wait_seconds = _NEWS_WAIT_SECONDS if patient else 0.0
        refreshing = [self._refresh(scope) for scope in stale]
        started = time.monotonic()
        done, _ = await asyncio.wait(refreshing, timeout=wait_seconds)
        left = wait_seconds - (time.monotonic() - started)
        changed = any(t.result() for t in done if not t.cancelled() and t.exception() is None)
        if left > 0 and (changed or self._is_restored(view)):
            await self._renewed(view, left)

    def _refresh(self, scope: str) -> asyncio.Task[bool]:
        task = self._refreshing.get(scope)
        if task is None:
            task = self._start(self._scopes.refresh(scope), f"refresh {scope}")
            self._refreshing[scope] = task
            task.add_done_callback(lambda _: self._refreshing.pop(scope, None))
        return task

    async def _keep_fresh(self) -> None:
        """Follow the scopes that builds use, until nobody has asked for ten minutes."""
        try:
            while views := self._in_use():
                await asyncio.sleep(_REFRESH_SECONDS)
                scopes = {scope for view in views for scope in view.scopes}
                if scopes:
                    await asyncio.wait([self._refresh(scope) for scope in scopes])
                for view in views:
                    if self._is_restored(view) or not view.current:
                        await self._renew(view)
        finally:
            self._loop_running = False

    def _is_restored(self, view: _View) -> bool:
        """Whether layers that a view had to do without may be there now; wants it anew then."""
        missing = view.ready.missing if view.ready is not None else ()
        aged = time.monotonic() - view.made_at > _MISSING_SECONDS
        restored = bool(missing) and (aged or any(map(self._store.is_offerable, missing)))
        if restored:
            view.wanted += 1
        return restored

    def _in_use(self) -> list[_View]:
        oldest = time.monotonic() - _IN_USE_SECONDS
        return [view for view in self._views.values() if view.asked_at > oldest]

    # -- making imports anew

    async def _changed(self, scope: str, key: str | None) -> None:
        """Take notice of a changed scope; what this node's build adds is ready at the end."""
        for view in list(self._views.values()):
            if scope in view.scopes:
                view.wanted += 1
        for view in self._in_use():
            # Views of other keys follow within seconds: most builds add nothing to them.
            if scope in view.scopes and key in {None, view.key}:
                task = self._start(self._renew(view), "unify")
                if key == view.key:
                    await asyncio.wait([task], timeout=_RENEW_SECONDS)

    async def _renewed(self, view: _View, timeout: float) -> None:
        """Wait until a view is up to date; it goes on when the time is over."""
        await asyncio.wait([self._start(self._renew(view), "unify")], timeout=timeout)

    async def _renew(self, view: _View) -> None:
        async with view.gate:
            while not view.current:
                wanted = view.wanted
                ready = await self._unifier.make(view.scopes, view.key)
                view.made, view.made_at = wanted, time.monotonic()
                view.ready = ready

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self._tasks.start(work, name=name)
