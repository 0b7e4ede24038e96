"""The seat of a build's client: who has it, and what becomes of the build when nobody has.

A build is the node's. While it needs its client it waits some time for a lost one to come back;
as soon as it needs nothing more, it goes on whether or not anybody comes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.outbox import Outbox
from offload_core.errors import AccessDeniedError, UsageError
from offload_proto.v1.node_service_pb2 import RunResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.needs import ClientNeeds
    from offload_core.errors import OffloadError

log = structlog.get_logger(__name__)

AWAY = "the client went away"
MAX_REFUSALS = 1000
"""Answers to `Leave` in one call; they are queued beyond the bound of its outbox."""


class Visit:
    """One call of a client to a build.

    Attributes:
        outbox: what it is told.
        view_only: it only looks on.
        over: it has what it wants, or can say nothing more.
        left: the user has left; the call ends well.
        refusals: how often it was told that it may not leave yet.
        error: why the node ends the call.
    """

    def __init__(self, outbox: Outbox | None = None, *, view_only: bool = False) -> None:
        self.outbox = outbox or Outbox()
        self.view_only = view_only
        self.over = asyncio.Event()
        self.left = False
        self.refusals = 0
        self.error: OffloadError | None = None

    def end(self, error: OffloadError | None = None) -> None:
        """End the call; what is unread is thrown away."""
        self.error = self.error or error
        self.outbox.drop()


class ClientSeat:
    """Who is the client of one build, and who looks on.

    Args:
        build_id: for the log.
        link: to whoever has the seat.
        needs: what the build needs a client for.
        rejoin_seconds: how long the build waits for a lost client that it needs.
        give_up: ends the build, with a reason.
        repeat: returns what a client that comes back must be asked and told again.
        detached: the user wants to leave as soon as that is possible.
    """

    def __init__(
        self,
        build_id: str,
        link: ClientLink,
        needs: ClientNeeds,
        rejoin_seconds: float,
        give_up: Callable[[str], None],
        repeat: Callable[[], list[RunResponse]],
        *,
        detached: bool = False,
    ) -> None:
        self._build_id = build_id
        self._link = link
        self._needs = needs
        self._rejoin_seconds = rejoin_seconds
        self._give_up = give_up
        self._repeat = repeat
        self._detached = detached
        self._holder: Visit | None = None
        self._visits: list[Visit] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        needs.on_change = self._needs_changed

    def first(self) -> Visit:
        """Return the visit of the client that starts the build."""
        visit = Visit(self._link.outbox)
        self._enter(visit)
        return visit

    def rejoin(self, visit: Visit) -> None:
        """Take a client in; unless it only looks on, it takes the place of a former one."""
        if not visit.view_only and not self._closed:
            former = self._holder
            if former is not None:
                self._visits.remove(former)
                former.end(
                    AccessDeniedError("another client has taken this build over and goes on there")
                )
            self._link.attach(visit.outbox)
            for message in self._repeat():
                visit.outbox.put_now(message)
            log.info("build.client.back", build_id=self._build_id, taken_over=former is not None)
        self._enter(visit)

    def _enter(self, visit: Visit) -> None:
        self._visits.append(visit)
        if not visit.view_only:
            self._holder = visit
            self._stop_timer()
        visit.outbox.put_now(RunResponse(independence=self._needs.message()))

    def leave(self, visit: Visit) -> bool:
        """Let the user go; False when the build needs the client.

        Raises:
            UsageError: it asks again and again.
        """
        if not visit.view_only and not self._closed and not self._needs.independent:
            visit.refusals += 1
            if visit.refusals > MAX_REFUSALS:
                raise UsageError("the client asks to leave again and again, and may not yet")
            visit.outbox.put_now(RunResponse(independence=self._needs.message()))
            return False
        visit.left = True
        self.lost(visit)
        visit.end()
        return True

    def lost(self, visit: Visit) -> None:
        """Note that a client says nothing more; harmless when it had no seat."""
        if self._holder is not visit:
            return
        self._holder = None
        self._link.detach(visit.outbox)
        if self._closed or self._link.lost:
            # One that was refused is not waited for: what needed it has failed with the reason.
            return
        independent = self._needs.independent
        log.info(
            "build.client.left" if visit.left else "build.client.lost",
            build_id=self._build_id,
            independent=independent,
            needs=self._needs.words,
        )
        if independent and (visit.left or self._detached):
            self._link.forgo()
        else:
            self._start_timer()

    def gone(self, visit: Visit) -> None:
        """Note that a call has ended."""
        self.lost(visit)
        if visit in self._visits:
            self._visits.remove(visit)

    @property
    def visits(self) -> int:
        """How many calls of clients are open."""
        return len(self._visits)

    @property
    def empty(self) -> bool:
        """Whether no call of a client is open."""
        return not self._visits

    def close(self) -> None:
        """The build has ended; nobody is waited for any more."""
        self._closed = True
        self._stop_timer()
        self._needs.clear()

    def _needs_changed(self) -> None:
        for visit in self._visits:
            visit.outbox.put_now(RunResponse(independence=self._needs.message()))
        waits = self._holder is None and not (self._closed or self._link.lost)
        if waits and not self._needs.independent:
            self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._rejoin_seconds, self._waited)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        self._timer = None
        if self._needs.independent:
            # It may still come back, but no answer of it is waited for.
            self._link.forgo()
        else:
            log.info("build.client.given_up", build_id=self._build_id, needs=self._needs.words)
            self._give_up(AWAY)
