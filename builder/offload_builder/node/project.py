"""What a node keeps per project: a BuildKit of its own, its cache, its context files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import DaemonSettings, RegistrySettings
from offload_builder.node.arrivals import Arrivals
from offload_builder.node.contextshare import SharedContext, SharingLimits, SharingThreads
from offload_builder.node.contextstore import ContextStore
from offload_builder.node.stickytimes import StickyTimes
from offload_builder.provider.process import tools_directory
from offload_core.config import read_toml
from offload_core.errors import ConfigError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from types import TracebackType

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.node.config import NodeConfig
    from offload_cache.nodestore import NodeStore, ProjectCache
    from offload_cache.uploads import UploadQueue

log = structlog.get_logger(__name__)

REAP_SECONDS = 5.0
EXPORT_WAIT_SECONDS = 1.0
MAX_ALIKE = 256
REGISTRY_KEYS = {"http", "insecure", "mirrors", "ca"}


class ProjectRuntime:
    """One project on this node; its BuildKit runs from the first build until it is idle."""

    def __init__(
        self,
        project_id: str,
        cache: ProjectCache,
        node_store: NodeStore,
        config: NodeConfig,
        registries: Mapping[str, RegistrySettings],
        folder: Path,
        threads: SharingThreads,
        busy: Callable[[], bool],
    ) -> None:
        self.project_id = project_id
        self.cache = cache
        self.native_platform = config.native_platforms()[0]
        self.context_store = ContextStore(folder / "context", keep_bytes=config.context_keep)
        self.arrivals = Arrivals()
        self.shared_context: SharedContext | None = None
        if node_store.objects is not None:
            self.shared_context = SharedContext(
                project_id,
                node_store.objects,
                folder / "context-share",
                limits=SharingLimits(config.context_shared_keep, config.context_shared_idle),
                threads=threads,
                read=self._read_blob,
                busy=busy,
            )
        self.times: StickyTimes
        self._times_path = folder / "times.db"
        self._node_store = node_store
        self._idle_seconds = config.buildkit_idle
        self._users = 0
        self._idle_since = time.monotonic()
        self._keys_in_use: dict[str, asyncio.Event | None] = {}
        self._alike: dict[str, str] = {}
        self._wipe_due = False
        self._daemon = BuildkitDaemon(
            DaemonSettings(
                root=folder / "buildkit",
                binary=config.buildkitd,
                registries=registries,
                search=(tools_directory(),),
                gc_max_used_bytes=config.buildkit_keep,
            )
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open what the project has on disk.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be opened.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.context_store)
            self.times = await self.context_store.run(StickyTimes, self._times_path)
            stack.callback(self.times.close)
            if self.shared_context is not None:
                await stack.enter_async_context(self.shared_context)
            await stack.enter_async_context(self._daemon)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _read_blob(self, digest: bytes) -> bytes | None:
        """Return a context blob for the shared store, which verifies it; None when it is gone."""
        try:
            return self.context_store.read_sync(digest, verify=False)
        except OffloadError as error:
            log.warning("context.blob.unreadable", sha256=digest.hex(), cause=error.message)
            return None

    @property
    def busy(self) -> bool:
        """Whether a build uses the project's BuildKit."""
        return self._users > 0

    @property
    def uploads(self) -> UploadQueue | None:
        """The queue to the shared store; None without one."""
        return self._node_store.uploads

    def cache_problem(self) -> str:
        """Return why the shared store is away; empty when it is not."""
        return self._node_store.shared_problem

    @asynccontextmanager
    async def use(self) -> AsyncIterator[BuildkitClient]:
        """Keep BuildKit running; starts it, also after a crash.

        Raises:
            ConfigError: buildkitd is missing.
            NodeLostError: it does not start.
        """
        self._users += 1
        try:
            if self._wipe_due and self._users == 1:
                await self._wipe()
            await self._daemon.ensure_running()
            yield self._daemon.client
        finally:
            self._users -= 1
            self._idle_since = time.monotonic()

    async def warm_up(self) -> None:
        """Start BuildKit ahead of a build; a failure is told by the build itself."""
        with contextlib.suppress(OffloadError):
            async with self.use():
                pass

    @asynccontextmanager
    async def shared_key(self, base: str, alike: str = "") -> AsyncIterator[str]:
        """Return the key of BuildKit's copy of the local sources, for one build at a time.

        Parallel builds of one kind get a slot each, so they do not undo each other's copy.

        Args:
            base: what the key begins with.
            alike: builds with this text are taken for one whose directory was renamed: one that
                has no copy yet goes on with that of another. Empty for none.

        Raises:
            QuotaExceededError: the disk is full.
        """
        if alike:
            base = await self._renamed(base, alike)
        slot = 0
        while (key := f"{base}-{slot}") in self._keys_in_use:
            exported = self._keys_in_use[key]
            if exported is not None:
                # An export needs the key for a moment only; another copy would cost more.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EXPORT_WAIT_SECONDS):
                        await exported.wait()
                if key not in self._keys_in_use:
                    break
            slot += 1
        self._keys_in_use[key] = None
        try:
            generation = self.times.known_generation(key)
            if not generation:
                generation = await self.context_store.run(self.times.generation, key)
            yield f"{key}-{generation}"
        finally:
            exported = self._keys_in_use.pop(key)
            if exported is not None:
                exported.set()

    async def _renamed(self, base: str, alike: str) -> str:
        before = self._alike.pop(alike, base)
        if before != base and not await self.context_store.run(self.times.knows, f"{base}-0"):
            base = before
        self._alike[alike] = base
        if len(self._alike) > MAX_ALIKE:
            del self._alike[next(iter(self._alike))]
        return base

    def exporting(self, shared_key: str) -> None:
        """Note that a build has ended and its key is held only until its export has begun."""
        for key in self._keys_in_use:
            if shared_key.startswith(f"{key}-"):
                self._keys_in_use[key] = asyncio.Event()

    async def wipe_ingest(self) -> bool:
        """Remove half-fetched content that has turned out to be damaged.

        It must not be taken away from builds that fetch something now: then it is done before
        the next build that has BuildKit to itself.

        Returns:
            Whether it is done.
        """
        self._wipe_due = True
        if self._users == 1:
            await self._wipe()
        return not self._wipe_due

    async def _wipe(self) -> None:
        self._wipe_due = False
        removed = await self._daemon.wipe_ingest()
        log.warning("buildkit.ingest.wiped", project_id=self.project_id, files=removed)

    async def rest(self) -> None:
        """Stop BuildKit when it has been idle for long, and enforce the bound of the context."""
        idle = self._users == 0 and time.monotonic() - self._idle_since > self._idle_seconds
        if idle and self._daemon.running:
            await self._daemon.stop()
            await self.context_store.trim()
            log.info("buildkit.stopped", project_id=self.project_id, reason="idle")
        elif self.context_store.trim_due:
            freed = await self.context_store.trim()
            log.info("context.trimmed", project_id=self.project_id, freed_bytes=freed)


class ProjectPool:
    """The projects of a node, opened at their first build.

    Raises:
        ConfigError: the registry settings cannot be read.
    """

    def __init__(self, config: NodeConfig, node_store: NodeStore) -> None:
        self._config = config
        self._registries = read_registries(config.registry_config)
        self._node_store = node_store
        self._threads = SharingThreads()
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._runtimes: dict[str, ProjectRuntime] = {}

    async def __aenter__(self) -> Self:
        self._stack.callback(self._threads.close)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await asyncio.gather(
                *(
                    runtime.shared_context.settle()
                    for runtime in self.running()
                    if runtime.shared_context is not None
                )
            )
        finally:
            await self._stack.aclose()

    def _busy(self) -> bool:
        return any(runtime.busy for runtime in self._runtimes.values())

    async def runtime(self, project_id: str) -> ProjectRuntime:
        """Return a project, opened now or before.

        Raises:
            UsageError: the name is no project name.
            OffloadError: its data cannot be opened.
        """
        async with self._opening:
            runtime = self._runtimes.get(project_id)
            if runtime is None:
                cache = await self._node_store.project(project_id)
                folder = self._config.data / "projects" / project_id
                runtime = await self._stack.enter_async_context(
                    ProjectRuntime(
                        project_id,
                        cache,
                        self._node_store,
                        self._config,
                        self._registries,
                        folder,
                        self._threads,
                        self._busy,
                    )
                )
                self._runtimes[project_id] = runtime
            return runtime

    def running(self) -> list[ProjectRuntime]:
        """Return the projects that are open."""
        return list(self._runtimes.values())

    async def reap(self) -> None:
        """Stop idle BuildKits until cancelled."""
        while True:
            await asyncio.sleep(REAP_SECONDS)
            for runtime in self.running():
                try:
                    await runtime.rest()
                except Exception as error:
                    log.error("project.rest.failed", project_id=runtime.project_id, exc_info=error)


def read_registries(path: Path | None) -> Mapping[str, RegistrySettings]:
    """Read BuildKit's registry settings: a table per host with http, insecure, mirrors, ca.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown.
    """
    if path is None:
        return {}
    found: dict[str, RegistrySettings] = {}
    hosts = read_toml(path).get("registry", {})
    if not isinstance(hosts, dict) or not all(isinstance(table, dict) for table in hosts.values()):
        raise ConfigError(f'{path}: write one table per host, for example [registry."docker.io"]')
    for host, table in hosts.items():
        unknown = set(table) - REGISTRY_KEYS
        if unknown:
            raise ConfigError(
                f"{path}: unknown key {min(unknown)!r} in registry {host!r}; "
                f"known keys are {', '.join(sorted(REGISTRY_KEYS))}"
            )
        found[host] = RegistrySettings(
            http=bool(table.get("http", False)),
            insecure=bool(table.get("insecure", False)),
            mirrors=tuple(table.get("mirrors", ())),
            ca_files=tuple(Path(item) for item in table.get("ca", ())),
        )
    return found
