"""What a build reached and was refused by URL, step by step, within bounds.

BuildKit lists at the end of a step's output what the step asked of its proxy; that is the only
place that names the step. A step can print such a list itself, so only addresses that the policy
was asked about count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.egress.urls.locations import shown_url

if TYPE_CHECKING:
    from offload_builder.egress.policy.model import Verdict
    from offload_builder.egress.urls.locations import Location
    from offload_proto.v1.events_pb2 import ProgressBatch, VertexLog

MAX_USES = 2000
MAX_REFUSALS = 500
_HEADING = b"proxy network requests:"
_STDERR = 2
_MAX_LINE = 4096


@dataclass(frozen=True, slots=True)
class UrlUse:
    """Something that was fetched.

    Attributes:
        step: name of the step; empty for sources of the build, and for requests of steps that have
            not ended yet.
        kind: "image", "git" or "http".
        url: without login and query.
        method: such as "GET"; empty for sources.
        status: of HTTP; 0 when not known.
        rule_id: of the rule that allows it.
        count: how often.
    """

    step: str
    kind: str
    url: str
    method: str = ""
    status: int = 0
    rule_id: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class UrlRefusal:
    """Something that was not fetched, because a rule says so.

    Attributes:
        steps: the steps that ran at that time; one of them has asked. Empty for sources.
        kind: "image", "git" or "http".
        url: without login and query.
        rule_id: of the rule that decided.
        rule_text: the rule in one line.
        place: where it is written.
        reason: one sentence for people.
        count: how often.
    """

    steps: tuple[str, ...]
    kind: str
    url: str
    rule_id: str
    rule_text: str
    place: str
    reason: str
    count: int = 1


class UrlRecord:
    """The list of one build.

    Attributes:
        left_out: how many different things had no room.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._rules: dict[tuple[str, str], str] = {}
        self._listed: set[str] = set()
        self._uses: dict[tuple[str, str, str, int], UrlUse] = {}
        self._refusals: dict[tuple[str, str], UrlRefusal] = {}
        self._names: dict[str, str] = {}
        self._running: set[str] = set()
        self._lists: dict[str, bytes] = {}
        self._tails: dict[str, bytes] = {}

    @property
    def uses(self) -> list[UrlUse]:
        """What was fetched: requests of steps first, then what no step is known of."""
        rest = [
            UrlUse("", kind, url, rule_id=rule_id)
            for (kind, url), rule_id in self._rules.items()
            if url not in self._listed
        ]
        return [*self._uses.values(), *rest]

    @property
    def refusals(self) -> list[UrlRefusal]:
        """What was refused."""
        return list(self._refusals.values())

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the steps that run now."""
        return tuple(sorted(self._names.get(digest, "") for digest in self._running))

    def allowed(self, place: Location, verdict: Verdict) -> None:
        """Note that something may be fetched."""
        key = (place.kind, place.url)
        if key in self._rules or self._has_room(len(self._rules), MAX_USES):
            self._rules[key] = verdict.rule_id

    def refused(self, place: Location, verdict: Verdict, reason: str) -> bool:
        """Note that something may not be fetched; returns whether that is news."""
        key = (place.url, verdict.rule_id)
        if (known := self._refusals.get(key)) is not None:
            self._refusals[key] = replace(known, count=known.count + 1)
            return False
        if not self._has_room(len(self._refusals), MAX_REFUSALS):
            return False
        self._refusals[key] = UrlRefusal(
            steps=self.running if place.kind == "http" else (),
            kind=place.kind,
            url=place.url,
            rule_id=verdict.rule_id,
            rule_text=verdict.rule_text,
            place=str(verdict.place),
            reason=reason,
        )
        return True

    def see(self, batch: ProgressBatch) -> None:
        """Look at the progress of the build."""
        for vertex in batch.vertices:
            self._names[vertex.digest] = vertex.name
            if vertex.HasField("completed_at"):
                self._running.discard(vertex.digest)
            elif vertex.HasField("started_at"):
                self._running.add(vertex.digest)
        for log in batch.logs:
            if log.stream == _STDERR:
                self._read(log)

    def _has_room(self, size: int, limit: int) -> bool:
        if size < limit:
            return True
        self.left_out += 1
        return False

    def _read(self, log: VertexLog) -> None:
        step, data = log.vertex, bytes(log.data)
        if step not in self._lists:
            data = self._tails.pop(step, b"") + data
            before, found, data = data.partition(_HEADING)
            if not found:
                # The heading may come in two pieces.
                self._tails[step] = before[-len(_HEADING) :]
                return
        *lines, rest = (self._lists.get(step, b"") + data).split(b"\n")
        self._lists[step] = rest[-_MAX_LINE:]
        for line in lines:
            self._take(step, line.decode("utf-8", "replace").strip())

    def _take(self, step: str, line: str) -> None:
        """Take a line "- METHOD URL -> STATUS"."""
        words = line.split(" ")
        if len(words) not in (3, 5) or words[0] != "-":
            return
        url = shown_url(words[2])
        rule_id = self._rules.get(("http", url))
        if rule_id is None:
            return
        status = int(words[4]) if len(words) == 5 and words[4].isdigit() else 0
        key = (step, words[1][:20], url, status)
        if (known := self._uses.get(key)) is not None:
            self._uses[key] = replace(known, count=known.count + 1)
        elif self._has_room(len(self._uses), MAX_USES):
            self._listed.add(url)
            name = self._names.get(step, "")
            self._uses[key] = UrlUse(name, "http", url, key[1], status, rule_id)
