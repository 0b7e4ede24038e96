"""The export of a client's build that is probably not needed, kept ready beside the build.

Most builds find everything in the cache, and everything of that is exported. To export it once more
costs the user some 20 ms. That nothing is new is known only at the end, and then the keys are gone
by which other nodes find the steps. So a solve of our own holds them until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.heldsolve import (
    answered_definition,
    held_requests,
    returned_result,
)
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.buildkit.controlapi import SolveOrder
    from offload_builder.buildkit.heldsolve import HeldSolve
    from offload_builder.buildkit.solve import Attributed

log = structlog.get_logger(__name__)

MAX_KEPT_BYTES = 4 << 20
"""Of one build's calls and their definitions; with more, the next build exports."""


def can_wait(order: SolveOrder) -> bool:
    """Whether the export of a build can be left to a solve of our own.

    The client has to be its frontend, as buildx is, with one result: what that is must be seen
    here before BuildKit makes it.
    """
    attributes = order.attributes
    return not (
        order.frontend
        or order.has_definition
        or "no-cache" in attributes
        or "," in attributes.get("platform", "")
        or "multi-platform" in attributes
        or "attest:sbom" in attributes
    )


class LaterExport:
    """Follows one build of a client; `close` at the end.

    Args:
        client: to BuildKit.
        build_id: for the log.
        exports: caches to write.
        show: takes serialised StatusResponses.
    """

    def __init__(
        self,
        client: BuildkitClient,
        build_id: str,
        exports: Sequence[Attributed],
        show: Callable[[bytes], None],
    ) -> None:
        self._client = client
        self._build_id = build_id
        self._exports = exports
        self._show = show
        self._order = b""
        self._calls: dict[str, tuple[bytes, bytes]] = {}
        self._bytes = 0
        self._held: HeldSolve | None = None

    def begin(self, order: bytes) -> None:
        """Take the control SolveRequest that BuildKit gets."""
        self._order = order

    def called(self, call: bytes, answer: bytes) -> None:
        """Take an LLBBridge SolveRequest and BuildKit's answer."""
        name, definition = answered_definition(answer)
        self._bytes += len(call) + len(definition)
        if self._bytes > MAX_KEPT_BYTES:
            self._calls.clear()
        elif name and definition:
            self._calls[name] = (call, definition)

    def returned(self, request: bytes) -> None:
        """Take the ReturnRequest, before BuildKit gets it and builds."""
        found = self._calls.get(returned_result(request))
        self._calls.clear()
        if found is not None and self._order and self._held is None:
            requests = held_requests(self._order, *found, self._exports)
            self._held = self._client.hold(requests, self._show)

    async def make(self) -> bool:
        """Export now; return whether everything has certainly been exported."""
        if self._held is None:
            log.warning("cache.export.failed", build_id=self._build_id, reason="no result was held")
            return False
        # Whoever has the results while the client's build is not over has them by its keys.
        complete = self._held.has_results
        try:
            await self._held.release()
        except (GrpcError, OffloadError, TimeoutError) as error:
            log.warning("cache.export.failed", build_id=self._build_id, reason=repr(error))
            return False
        return complete

    async def close(self) -> None:
        """Give up what is held; safe to call again."""
        if self._held is not None:
            await self._held.close()
