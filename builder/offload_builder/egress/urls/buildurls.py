"""The rules that BuildKit asks about one build, and what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import structlog

from offload_builder.egress.policy.model import BUILT_IN, Layer, Verdict
from offload_builder.egress.policy.weburl import printable
from offload_builder.egress.urls.locations import Location, OddSourceError, location_of
from offload_builder.egress.urls.urlrecord import UrlRecord
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from offload_builder.buildkit.providers import SourceUse
    from offload_builder.egress.urls.urlpolicy import UrlPolicy
    from offload_proto.v1.events_pb2 import ProgressBatch

_log = structlog.get_logger(__name__)
_MAX_NOTICES = 20
_MAX_SHOWN = 200


class Tells(Protocol):
    """The way to the person who builds."""

    async def notice(self, text: str, *, level: str = "warning") -> None:
        """Show a sentence."""
        ...


class BuildUrls:
    """Serves BuildKit's `SourceRules` for one build; `close` at the end.

    Args:
        build_id: for logs.
        policy: returns what holds now.
        link: to the person, who is told of what steps are refused; a source that is refused ends
            the build with the same words.

    Attributes:
        record: what came of it.
        tells_sources: the person is told of refused sources as well; for clients that do not show
            the reason in an error.
        proxied: steps run behind BuildKit's proxy; all solves of a build do alike, as this is part
            of what a step is in BuildKit's cache.
    """

    def __init__(self, build_id: str, policy: Callable[[], UrlPolicy], link: Tells) -> None:
        self.record = UrlRecord()
        self.tells_sources = False
        self.proxied = policy().proxied
        self._build_id = build_id
        self._policy = policy
        self._link = link
        self._told = 0
        self._tasks = TaskSet()

    def see(self, batch: ProgressBatch) -> None:
        """Look at the progress of the build."""
        self.record.see(batch)

    def check(self, use: SourceUse) -> str:
        """Return why something may not be fetched; empty when it may."""
        policy = self._policy()
        try:
            place = location_of(use.identifier, use.attributes)
        except OddSourceError as error:
            kind = printable(use.identifier.partition("://")[0][:40])
            place = Location("odd", "", 0, kind)
            verdict = Verdict(
                allowed=False,
                rule_id="unknown-source",
                rule_text="sources of known kinds only",
                place=BUILT_IN,
                reason=str(error),
            )
        else:
            verdict = policy.verdict(place)
        if verdict.allowed:
            if not place.is_local:
                self.record.allowed(place, verdict)
            return ""
        # Whoever builds has written the policy of the build.
        contact = "" if verdict.layer is Layer.BUILD else policy.contact
        reason = _sentence(place, verdict, contact)
        if self.record.refused(place, verdict, reason):
            self._tell(place, verdict, reason)
        return reason

    async def close(self) -> None:
        """Say what is still to be said."""
        await self._tasks.drain(1.0)
        await self._tasks.close()

    def _tell(self, place: Location, verdict: Verdict, reason: str) -> None:
        _log.info(
            "egress.url.denied",
            build_id=self._build_id,
            url=place.url[:_MAX_SHOWN],
            rule=verdict.rule_id,
        )
        steps = self.record.running if place.kind == "http" else ()
        if not (steps or self.tells_sources) or self._told >= _MAX_NOTICES:
            return
        self._told += 1
        # Several steps may run; BuildKit does not say which one it was.
        who = f"{printable(' or '.join(steps)[:_MAX_SHOWN])}: " if steps else ""
        self._tasks.start(self._link.notice(f"{who}{reason}"), name=f"egress.{self._build_id}")


def urls_of(
    build_id: str, policy: Callable[[], UrlPolicy | None], link: Tells, stack: AsyncExitStack
) -> BuildUrls | None:
    """Return the rules of a build, closed with `stack`; None where its project has none."""
    first = policy()
    if first is None:
        return None
    urls = BuildUrls(build_id, lambda: policy() or first, link)
    stack.push_async_callback(urls.close)
    return urls


def _sentence(place: Location, verdict: Verdict, contact: str) -> str:
    text = f"egress: {place.url[:_MAX_SHOWN]} was refused: {verdict.reason}"
    text += f" (rule {verdict.rule_id}: {verdict.rule_text}, {verdict.place})"
    return f"{text}; ask {contact} for it" if contact else text
