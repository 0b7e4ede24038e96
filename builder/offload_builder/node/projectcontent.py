"""Files of build contexts that builds of a project may use without sending them again."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.arrivals import Arrivals
from offload_builder.node.contextshare import SharedContext
from offload_builder.node.contextstore import ContextStore
from offload_builder.node.why.answer import WhyDesk
from offload_builder.node.why.tracestore import TraceStore
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from offload_builder.node.config import NodeConfig
    from offload_builder.node.contextshare import SharingThreads
    from offload_builder.node.trustdomain import TrustDomain
    from offload_cache.objectstore import ObjectStore

log = structlog.get_logger(__name__)


class ProjectContent:
    """Context files of those who may have each other's; an async context manager.

    Members and protected builds of a project share one: content is verified against its digest
    before it is stored, so nobody can change what another one reads, and a digest is as good as
    the bytes among people who may read each other's files anyway. An untrusted member has one of
    its own that only its own uploads fill: naming a digest gives it nothing of the project.

    Attributes:
        store: on this node.
        arrivals: what is on its way.
        shared: what the pool has; None without a shared store and for untrusted members.
        traces: of builds, for those who ask which steps ran.
        why: answers them.
    """

    def __init__(
        self,
        domain: TrustDomain,
        config: NodeConfig,
        objects: ObjectStore | None,
        threads: SharingThreads,
        busy: Callable[[], bool],
    ) -> None:
        folder = domain.folder(config)
        self.store = ContextStore(folder / "context", keep_bytes=domain.context_keep(config))
        self.arrivals = Arrivals()
        self.shared: SharedContext | None = None
        if objects is not None and not domain.is_untrusted:
            self.shared = SharedContext(
                domain.project_id,
                objects,
                folder / "context-share",
                idle_seconds=config.context_shared_idle,
                threads=threads,
                read=self._read_blob,
                busy=busy,
            )
        kept_for_all = None if domain.is_untrusted else objects
        self.traces = TraceStore(domain.project_id, folder / "traces", kept_for_all)
        self.why = WhyDesk(domain.project_id, self.traces, self.store, self.shared, kept_for_all)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open what is on disk.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be opened.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            if self.shared is not None:
                await stack.enter_async_context(self.shared)
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
            return self.store.read_sync(digest, verify=False)
        except OffloadError as error:
            log.warning("context.blob.unreadable", sha256=digest.hex(), cause=error.message)
            return None
