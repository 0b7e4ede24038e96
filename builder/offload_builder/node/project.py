"""What a node keeps per project: a BuildKit of its own, its cache, its context files."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import DaemonSettings, RegistrySettings
from offload_builder.node.contextstore import ContextStore
from offload_builder.node.stickytimes import StickyTimes
from offload_builder.provider.process import tools_directory
from offload_core.config import read_toml
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from types import TracebackType

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.node.config import NodeConfig
    from offload_cache.nodestore import NodeStore, ProjectCache
    from offload_cache.uploads import UploadQueue

log = structlog.get_logger(__name__)

REAP_SECONDS = 5.0
REGISTRY_KEYS = {"http", "insecure", "mirrors", "ca"}


class ProjectRuntime:
    """One project on this node; its BuildKit runs from the first build until it is idle."""

    def __init__(
        self,
        project_id: str,
        cache: ProjectCache,
        node_store: NodeStore,
        config: NodeConfig,
        folder: Path,
    ) -> None:
        self.project_id = project_id
        self.cache = cache
        self.native_platform = config.native_platforms()[0]
        self.context_store = ContextStore(folder / "context", keep_bytes=config.context_keep)
        self.times = StickyTimes(folder / "times.db")
        self._node_store = node_store
        self._idle_seconds = config.buildkit_idle
        self._users = 0
        self._idle_since = time.monotonic()
        self._keys_in_use: set[str] = set()
        self._daemon = BuildkitDaemon(
            DaemonSettings(
                root=folder / "buildkit",
                binary=config.buildkitd,
                registries=read_registries(config.registry_config),
                search=(tools_directory(),),
                gc_max_used_bytes=config.buildkit_keep,
            )
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.times.close)
            await stack.enter_async_context(self.context_store)
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

    @property
    def uploads(self) -> UploadQueue | None:
        """The queue to the shared store; None without one."""
        return self._node_store.uploads

    @property
    def buildkit_pid(self) -> int | None:
        """Process id of the BuildKit daemon while it runs."""
        return self._daemon.pid

    def cache_problem(self) -> str:
        """Return why the shared store is away; empty when it is not."""
        objects = self._node_store.objects
        return objects.state if objects is not None and not objects.reachable else ""

    @asynccontextmanager
    async def use(self) -> AsyncIterator[BuildkitClient]:
        """Keep BuildKit running; starts it, also after a crash.

        Raises:
            ConfigError: buildkitd is missing.
            NodeLostError: it does not start.
        """
        self._users += 1
        try:
            await self._daemon.ensure_running()
            yield self._daemon.client
        finally:
            self._users -= 1
            self._idle_since = time.monotonic()

    @contextmanager
    def shared_key(self, base: str) -> Iterator[str]:
        """Return the key of BuildKit's copy of the local sources, for one build at a time.

        Parallel builds of one kind get a slot each, so they do not undo each other's copy.
        """
        slot = 0
        while (key := f"{base}-{slot}") in self._keys_in_use:
            slot += 1
        self._keys_in_use.add(key)
        try:
            yield f"{key}-{self.times.generation(key)}"
        finally:
            self._keys_in_use.discard(key)

    async def wipe_ingest(self) -> None:
        """Remove half-fetched content that has turned out to be damaged."""
        removed = await self._daemon.wipe_ingest()
        log.warning("buildkit.ingest.wiped", project_id=self.project_id, files=removed)

    async def rest(self) -> None:
        """Stop BuildKit when it has been idle for long, and enforce the bound of the context."""
        idle = self._users == 0 and time.monotonic() - self._idle_since > self._idle_seconds
        if idle and self._daemon.running:
            await self._daemon.stop()
            await self.context_store.trim()
            log.info("buildkit.stopped", project_id=self.project_id, reason="idle")


class ProjectPool:
    """The projects of a node, opened at their first build."""

    def __init__(self, config: NodeConfig, node_store: NodeStore) -> None:
        self._config = config
        self._node_store = node_store
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._runtimes: dict[str, ProjectRuntime] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def runtime(self, project_id: str) -> ProjectRuntime:
        """Return a project, opened now or before.

        Raises:
            UsageError: the name is no project name.
        """
        async with self._opening:
            runtime = self._runtimes.get(project_id)
            if runtime is None:
                cache = await self._node_store.project(project_id)
                folder = self._config.data / "projects" / project_id
                runtime = await self._stack.enter_async_context(
                    ProjectRuntime(project_id, cache, self._node_store, self._config, folder)
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
                await runtime.rest()


def read_registries(path: Path | None) -> Mapping[str, RegistrySettings]:
    """Read BuildKit's registry settings: a table per host with http, insecure, mirrors, ca.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown.
    """
    if path is None:
        return {}
    found: dict[str, RegistrySettings] = {}
    for host, table in read_toml(path).get("registry", {}).items():
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
