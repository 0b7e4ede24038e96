"""One build of a BuildKit client, from its Solve call to its end.

Its calls come in any order: Solve, Status, Session and those of the frontend are tied by the
client's name for the build. All of them wait until the gateway has admitted it; when it is refused
all of them say why.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_builder.buildkit.controlapi import SolveOrder
from offload_builder.buildkit.frontendreplay import FrontendReplay
from offload_builder.buildkit.h2.messages import CANCELLED, UNAVAILABLE, GrpcError
from offload_builder.node.proxy.feed import StatusFeed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_builder.node.proxy.relayedjob import RelayedJob

_SHARED = "local-sessionid:"


class ClientBuild:
    """One name that a client has given to a build.

    Attributes:
        ref: the name.
        order: what its Solve call asks; None before that has come.
        feed: its progress.
        job: the build at this node; None before it is admitted.
        opened: BuildKit knows it, so its calls can be passed on.
        over: nothing more happens to it.
        said: what the client has said as its frontend.
    """

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.order: SolveOrder | None = None
        self.feed = StatusFeed()
        self.said = FrontendReplay()
        self.job: RelayedJob | None = None
        self.error: GrpcError | None = None
        self.begun = asyncio.Event()
        self.opened = asyncio.Event()
        self.over = asyncio.Event()
        self._returned = asyncio.Event()
        self._works = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """Whether the client only asks what BuildKit can do, as far as is known."""
        order = self.order
        if order is None or not order.internal or self._works.is_set():
            return False
        return not (order.frontend or order.has_definition)

    def serves(self, session_id: str) -> bool:
        """Whether it is admitted and uses this session, its own or one that builds share."""
        job, order = self.job, self.order
        if job is None or order is None:
            return False
        if session_id != order.session and session_id not in shared_sessions(order.attributes):
            return False
        return job.ready.done() and not job.ready.cancelled()

    def owns(self, session_id: str) -> bool:
        """Whether this session is its own."""
        return self.order is not None and self.order.session == session_id

    def begin(self, order: SolveOrder) -> None:
        """Take the Solve call."""
        self.order = order
        self.begun.set()

    async def stays_empty(self) -> bool:
        """Wait until the client ends a build in which nothing was done, or asks for work."""
        ended = asyncio.ensure_future(self._returned.wait())
        works = asyncio.ensure_future(self._works.wait())
        try:
            await asyncio.wait((ended, works), return_when=asyncio.FIRST_COMPLETED)
            return not self._works.is_set()
        finally:
            ended.cancel()
            works.cancel()

    def give_back(self) -> None:
        """Take the end of a build in which nothing was done."""
        self._returned.set()

    async def wait_open(self) -> RelayedJob:
        """Wait until calls can be passed on, and return the job.

        Raises:
            GrpcError: the build was refused, or is over.
        """
        self._works.set()
        opened = asyncio.ensure_future(self.opened.wait())
        over = asyncio.ensure_future(self.over.wait())
        try:
            await asyncio.wait((opened, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
            over.cancel()
        if self.error is not None:
            raise self.error
        if self.job is None or (self.over.is_set() and not self.opened.is_set()):
            raise GrpcError(CANCELLED, "the build has ended")
        return self.job

    def fail(self, error: GrpcError) -> None:
        """Let all calls of the build say what is wrong; the first error holds."""
        self.error = self.error or error

    def end(self) -> None:
        """Note that the Solve call has ended."""
        self.over.set()
        if self.order is not None:
            # It is remembered for a while, but not all that was asked.
            self.order = SolveOrder(self.ref, self.order.session)
        if self.job is None:
            self.feed.finish()


def shared_sessions(attributes: Mapping[str, str]) -> set[str]:
    """Return the sessions that a build reads local directories from beside its own.

    buildx bake makes them for directories that several targets have in common. BuildKit looks for
    such a session for 5 s, then reads a directory of the same name of any other, which is a wrong
    one where targets have several contexts.

    Source: buildx, build/build.go (detectSharedMounts); BuildKit, source/local.
    """
    return {
        value.rpartition(":")[2]
        for key, value in attributes.items()
        if key.startswith(_SHARED) and value
    }


def daemon_lost(sentence: str) -> GrpcError:
    """Return the status of calls whose daemon went away."""
    return GrpcError(UNAVAILABLE, sentence)
