"""What one build reached in the network and was refused: lines of its log, and its record."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from offload_builder.egress.policy.model import Layer
from offload_builder.egress.policy.weburl import printable
from offload_builder.egress.urls.urlpolicy import OWN_REGISTRY
from offload_proto.v1.events_pb2 import EgressUse, ProgressBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.egress.policy.model import Policy
    from offload_builder.egress.urls.urlrecord import UrlRecord
    from offload_builder.node.egresstold import Told

_log = structlog.get_logger(__name__)

MAX_RECORDED = 500
"""Different things that a build reached, and as many that it was refused."""
MAX_LINES_OF_STEP, MAX_LINES = 20, 100
NETWORK_STEP = "sha256:" + "0" * 56 + "0ff10ad0"
"""Digest of a step of our own, for what no step is known of."""
_NETWORK_NAME = "[offload] network"
_LATE_SECONDS = 3.0
"""News may come so long after the end of their step."""
_STEP = re.compile(r"\[([^\]]*\d+/\d+)\] (\w+)")
_STDERR = 2
_MAX_NAME = 80


class Candidate(NamedTuple):
    """A step that may have asked for something.

    Attributes:
        name: as the build shows it.
        begun_at: seconds since 1970.
        ended: when its end was heard of, in seconds of the monotonic clock; None while it runs.
    """

    name: str
    begun_at: float
    ended: float | None


class BuildEgress:
    """The report of one build. Belongs to the event loop.

    Args:
        build_id: for logs.
        say: puts news into the progress of the build, where people and the record get them.
    """

    def __init__(self, build_id: str, say: Callable[[ProgressBatch], None]) -> None:
        self.build_id = build_id
        self.any_failed = False
        """Whether a step has failed."""
        self._say = say
        self._names: dict[str, str] = {}
        self._open: dict[str, Candidate] = {}
        self._uses: dict[tuple[object, ...], EgressUse] = {}
        self._sizes = {True: 0, False: 0}
        self._changed: set[tuple[object, ...]] = set()
        self._lines: dict[str, int] = {}
        self._unended: set[str] = set()
        """Steps whose output is within a line."""
        self._sentences: dict[str, list[str]] = {}
        self._left_out = 0

    def see(self, batch: ProgressBatch) -> None:
        """Look at the progress of the build."""
        now = time.monotonic()
        for vertex in batch.vertices:
            self._names[vertex.digest] = vertex.name or self._names.get(vertex.digest, "")
            self.any_failed = self.any_failed or bool(vertex.error)
            if vertex.cached or not vertex.HasField("started_at"):
                continue
            begun_at = vertex.started_at.ToNanoseconds() / 1e9
            ended = now if vertex.HasField("completed_at") else None
            name = self._names[vertex.digest]
            self._open[vertex.digest] = Candidate(name, begun_at, ended)
        for log in batch.logs:
            if log.data.endswith(b"\n"):
                self._unended.discard(log.vertex)
            elif log.data:
                self._unended.add(log.vertex)

    def knows(self, digest: str) -> bool:
        """Return whether a step is one of this build."""
        return digest in self._names

    def candidates(self) -> dict[str, Candidate]:
        """Return the steps that run, or ran a moment ago, by digest."""
        limit = time.monotonic() - _LATE_SECONDS
        self._open = {
            digest: item
            for digest, item in self._open.items()
            if item.ended is None or item.ended > limit
        }
        return self._open

    def take(self, told: Told, vertices: Sequence[str], policy: Policy) -> None:
        """Take what the firewall or the resolver saw of the build.

        Args:
            told: what it was.
            vertices: steps of this build that it may have been; one, where that is known.
            policy: what held.
        """
        verdict = told.verdict
        vertex = vertices[0] if len(vertices) == 1 else ""
        use = EgressUse(
            vertex=vertex,
            allowed=verdict.allowed,
            host=told.host,
            address=told.address,
            port=told.port or 0,
            protocol=told.protocol.value,
            rule_id=verdict.rule_id,
            rule_text=verdict.rule_text,
            place=str(verdict.place),
            reason="" if verdict.allowed else verdict.reason,
            count=1,
        )
        use.first_at.FromNanoseconds(int(told.time * 1e9))
        news = ProgressBatch()
        if self._note(use):
            news.egress.append(use)
            if not verdict.allowed:
                names = [self._names.get(digest, "") for digest in vertices]
                self._add_line(news, vertex, refusal(told, names, policy, self._project(told)))
        if news.ByteSize():
            self._say(news)

    @staticmethod
    def _project(told: Told) -> str:
        return told.place.partition("~")[0]

    def sentences(self, vertex: str) -> list[str]:
        """Return the first refusals of a step, for its failure."""
        found = [*self._sentences.get(vertex, ()), *self._sentences.get("", ())]
        return found[:3]

    def finish(self, urls: UrlRecord | None) -> None:
        """Complete the record at the end of the build."""
        news = ProgressBatch(egress=[self._uses[key] for key in self._changed])
        if urls is not None:
            news.egress.extend(self._from_urls(urls))
        self._changed.clear()
        if self._left_out:
            _log.info("egress.record.full", build_id=self.build_id, left_out=self._left_out)
        if news.egress:
            self._say(news)

    def _note(self, use: EgressUse) -> bool:
        """Count something; return whether it is news."""
        key = _key(use)
        known = self._uses.get(key)
        if known is not None:
            known.count += use.count
            self._changed.add(key)
            return False
        if self._sizes[use.allowed] >= MAX_RECORDED:
            self._left_out += 1
            return False
        self._sizes[use.allowed] += 1
        self._uses[key] = use
        return True

    def _add_line(self, news: ProgressBatch, vertex: str, sentence: str) -> None:
        count = self._lines[vertex] = self._lines.get(vertex, 0) + 1
        if count > MAX_LINES_OF_STEP or sum(self._lines.values()) > MAX_LINES:
            if count == MAX_LINES_OF_STEP + 1:
                sentence = f"egress: more was refused; see offload inspect {self.build_id}"
            else:
                return
        self._sentences.setdefault(vertex, []).append(sentence)
        shown = vertex or NETWORK_STEP
        now = time.time_ns()
        if not vertex:
            step = news.vertices.add(digest=shown, name=_NETWORK_NAME)
            step.started_at.FromNanoseconds(now)
            step.completed_at.FromNanoseconds(now)
        start = "\n" if shown in self._unended else ""
        self._unended.discard(shown)
        line = news.logs.add(vertex=shown, stream=_STDERR, data=f"{start}{sentence}\n".encode())
        line.timestamp.FromNanoseconds(now)

    def _from_urls(self, urls: UrlRecord) -> list[EgressUse]:
        digests = {name: digest for digest, name in self._names.items()}
        found = [
            EgressUse(
                vertex=digests.get(item.step, ""),
                allowed=True,
                url=item.url,
                protocol="tcp",
                rule_id=item.rule_id,
                count=item.count,
            )
            for item in urls.uses
            if item.rule_id != OWN_REGISTRY
        ]
        found += [
            EgressUse(
                vertex=digests.get(item.steps[0], "") if len(item.steps) == 1 else "",
                url=item.url,
                protocol="tcp",
                rule_id=item.rule_id,
                rule_text=item.rule_text,
                place=item.place,
                reason=item.reason,
                count=item.count,
            )
            for item in urls.refusals
        ]
        joined: dict[tuple[object, ...], EgressUse] = {}
        for use in found:
            # Different methods and answers are one thing here.
            known = joined.setdefault((use.vertex, use.allowed, use.url, use.rule_id), use)
            if known is not use:
                known.count += use.count
        return list(joined.values())


def refusal(told: Told, names: Sequence[str], policy: Policy, project_id: str) -> str:
    """Return the sentence that people see.

    Args:
        told: what was refused.
        names: of the steps that it may have been; none where it was no step.
        policy: what held.
        project_id: of the build.
    """
    who = " or ".join(dict.fromkeys(_label(name) for name in names[:3])) or "the build"
    verdict = told.verdict
    target = str(told)
    if told.port is None and told.address and told.host:
        target = f"{told.host} at {told.address}"
    note = f"{told.note}; " if told.note else ""
    if verdict.layer is Layer.BUILD:
        # Whoever builds has written it, so there is nobody to ask.
        return (
            f"egress: {who} was refused {target} ({note}rule {verdict.rule_id}, {verdict.place}); "
            "the build's own --network-policy does not allow it"
        )
    owner = {
        Layer.POOL: f"pool {policy.name}" if policy.name else "the pool's",
        Layer.PROJECT: f"project {project_id}",
    }[verdict.layer]
    ask = f"ask {policy.contact} or " if policy.contact else ""
    return (
        f"egress: {who} was refused {target} ({note}rule {verdict.rule_id}, {owner}); "
        f"{ask}see offload policy explain"
    )


def _label(name: str) -> str:
    found = _STEP.match(name)
    shown = f"{found[2]} step {found[1][:_MAX_NAME]}" if found else name[:_MAX_NAME]
    return printable(shown)


def _key(use: EgressUse) -> tuple[object, ...]:
    return (use.vertex, use.allowed, use.host, use.address, use.port, use.protocol, use.rule_id)
