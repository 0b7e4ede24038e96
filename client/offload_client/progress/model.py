"""The state of a build, merged from the node's progress batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.progress.clock import NANOSECONDS, nanoseconds
from offload_client.progress.step import Counter, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_proto.v1.events_pb2 import (
        ProgressBatch,
        Vertex,
        VertexLog,
        VertexStatus,
        VertexWarning,
    )


class BuildView:
    """Merges batches by step; knows nothing of how they are shown.

    The rules are those of BuildKit's own printer (util/progress/progressui): a step that is
    reported several times keeps every interval in which it ran, a step of a progress group is
    part of the group's step, and a weak group is hidden until something in it that is not weak
    starts. Output of a step that was never announced is kept under a step of its own, so that
    no line is lost.

    Not thread-safe: displays call it under their lock.
    """

    def __init__(self, now: float) -> None:
        """Start an empty view at `now`, local monotonic seconds."""
        self.steps: dict[str, Step] = {}
        """By digest, or by the group's id, in the order of the first mention."""
        self.shown: list[Step] = []
        """Steps that started and are not hidden, in the order of the first start."""
        self.warnings: list[VertexWarning] = []
        self.pending_log_bytes = 0
        """Output held in the steps' logs."""
        self._began = now
        self._now = now
        self._node_ahead = float("-inf")
        self._node_began_ns: int | None = None
        self._owner: dict[str, Step] = {}
        self._shown: set[str] = set()
        self._news: dict[str, int] = {}

    def apply(self, batch: ProgressBatch, now: float, *, local: bool = False) -> None:
        """Merge one batch.

        Args:
            batch: what happened since the last one.
            now: local monotonic seconds.
            local: the steps in it are the client's own, their times are of the local clock.
        """
        self._now = now
        groups: dict[str, Step] = {}
        for vertex in batch.vertices:
            if vertex.progress_group:
                group = self._join_group(vertex)
                groups[group.digest] = group
            else:
                self._merge_vertex(vertex, now, local)
        for group in groups.values():
            self._refresh_group(group, now)
        for status in batch.statuses:
            self._merge_status(status, now, local)
        for warning in batch.warnings:
            self._merge_warning(warning)
        if batch.logs:
            self._append_logs(batch.logs, now, local)

    def take_news(self) -> dict[str, int]:
        """Return how much happened, by step, since the last call; hidden steps keep theirs."""
        news = self._news
        if not news:
            return news
        kept = {key: count for key, count in news.items() if self.steps[key].hidden}
        self._news = kept
        for key in kept:
            del news[key]
        return news

    def reveal_all(self) -> None:
        """Show hidden steps too that have output; for the end of a build."""
        for step in list(self.steps.values()):
            if step.hidden and step.log:
                step.hidden = False
                self._show(step)

    def begin_again(self) -> None:
        """Drop the steps of a run that was lost; the next one may have another node's clock."""
        self.steps = {key: step for key, step in self.steps.items() if _goes_on(step)}
        self.shown = [step for step in self.shown if _goes_on(step)]
        self._owner = {key: step for key, step in self._owner.items() if _goes_on(step)}
        self._shown = {step.digest for step in self.shown}
        self._news = {key: count for key, count in self._news.items() if key in self.steps}
        self.warnings.clear()
        self.pending_log_bytes = sum(step.log_bytes for step in self.steps.values())
        self._node_ahead = float("-inf")
        self._node_began_ns = None

    def elapsed_seconds(self, now: float) -> float:
        """Return how long the build has run, at `now` in local monotonic seconds."""
        node = 0.0
        if self._node_began_ns is not None:
            node = self.node_now(now) - self._node_began_ns / NANOSECONDS
        return max(0.0, now - self._began, node)

    def node_now(self, now: float) -> float:
        """Return what the node's clock shows at least, at `now`, in seconds since 1970.

        The clocks of this machine and of the node are never compared. Of the node's clock it is
        known only that it had reached a time when a message with that time arrived, and it went
        on since. When a build is attached to late, this tells how long its steps have run.
        """
        return now + self._node_ahead

    def counts(self) -> tuple[int, int]:
        """Return the number of completed and of all known steps, without hidden ones."""
        visible = [step for step in self.steps.values() if not step.hidden]
        return sum(step.completed for step in visible), len(visible)

    def _merge_vertex(self, vertex: Vertex, now: float, local: bool) -> None:
        step = self._owner.get(vertex.digest)
        if step is None:
            step = self._add(vertex.digest, local)
        started = vertex.HasField("started_at")
        completed = vertex.HasField("completed_at")
        if not started:
            # The announcement may be repeated after the start; it must not undo anything.
            if not step.intervals:
                step.name = vertex.name or step.name
                step.inputs = tuple(vertex.inputs)
            return
        start = nanoseconds(vertex.started_at)
        end = nanoseconds(vertex.completed_at) if completed else None
        if not local:
            self._saw(start if end is None else end)
            if self._node_began_ns is None:
                self._node_began_ns = start
        before = (
            step.name,
            step.cached,
            step.error,
            len(step.intervals),
            step.intervals.get(start),
        )
        if not step.intervals:
            step.anchor = now
        step.name = vertex.name or step.name
        step.inputs = tuple(vertex.inputs)
        step.cached = vertex.cached
        step.error = vertex.error
        if end is not None or start not in step.intervals:
            step.intervals[start] = end
        after = (step.name, step.cached, step.error, len(step.intervals), step.intervals.get(start))
        self._show(step)
        if after != before:
            self._tell(step)

    def _join_group(self, vertex: Vertex) -> Step:
        key = vertex.progress_group
        group = self.steps.get(key)
        if group is None:
            group = self._add(key, local=False)
            group.name = vertex.progress_group_name
            group.hidden = True
        group.members[vertex.digest] = vertex
        self._owner[vertex.digest] = group
        return group

    def _refresh_group(self, group: Step, now: float) -> None:
        before = (group.cached, group.error, group.hidden, dict(group.intervals))
        group.cached = all(member.cached for member in group.members.values())
        group.error = next((m.error for m in group.members.values() if m.error), "")
        if group.error:
            group.hidden = False
        for member in group.members.values():
            if not member.HasField("started_at"):
                continue
            if not member.progress_group_weak:
                group.hidden = False
            if not group.intervals:
                group.anchor = now
            start = nanoseconds(member.started_at)
            end = nanoseconds(member.completed_at) if member.HasField("completed_at") else None
            group.intervals[start] = end
            self._saw(start if end is None else end)
        if not group.hidden and group.intervals:
            self._show(group)
        if before != (group.cached, group.error, group.hidden, group.intervals):
            self._tell(group)

    def _merge_status(self, status: VertexStatus, now: float, local: bool) -> None:
        step = self._owner.get(status.vertex)
        if step is None:
            step = self._add(status.vertex, local)
        counter = step.counters.get(status.id)
        if counter is None:
            counter = step.counters[status.id] = Counter(status.id, anchor=now)
        counter.current = status.current
        counter.total = status.total
        if local:
            counter.note = status.name
        counter.timestamp_ns = nanoseconds(status.timestamp)
        if status.HasField("started_at"):
            start = nanoseconds(status.started_at)
            if counter.started_ns is None or start < counter.started_ns:
                counter.started_ns = start
        counter.completed_ns = (
            nanoseconds(status.completed_at) if status.HasField("completed_at") else None
        )
        if not local:
            self._saw(counter.timestamp_ns)
        step.changed_counters.add(status.id)
        self._tell(step)

    def _merge_warning(self, warning: VertexWarning) -> None:
        step = self._owner.get(warning.vertex)
        if step is None:
            step = self._add(warning.vertex, local=False)
        step.warnings.append(warning)
        self.warnings.append(warning)
        if not step.completed:
            # One that comes late is not worth going back to the step: it is in the list at the end.
            self._tell(step)

    def _append_logs(self, logs: Iterable[VertexLog], now: float, local: bool) -> None:
        # The hot path: thousands of these may come in one batch, mostly of one step.
        digest, step, base = "", None, 0
        moment = count = size = 0
        for log in logs:
            if step is None or log.vertex != digest:
                if step is not None:
                    self._logged(step, count, size)
                digest, count, size = log.vertex, 0, 0
                step = self._owner.get(digest)
                if step is None:
                    step = self._add(digest, local)
                    step.anchor = now
                base = step.started_ns or 0
            data = log.data
            if not data:
                continue
            stamp = log.timestamp
            moment = stamp.seconds * NANOSECONDS + stamp.nanos
            offset = (moment - base) / NANOSECONDS if base and moment > base else 0.0
            step.log.append((offset, data))
            count += 1
            size += len(data)
        if step is not None:
            self._logged(step, count, size)
        if not local:
            self._saw(moment)

    def _logged(self, step: Step, count: int, size: int) -> None:
        if not count:
            return
        step.log_bytes += size
        self.pending_log_bytes += size
        if step.hidden:
            step.hidden = False
            self._show(step)
        self._tell(step, count)

    def _add(self, key: str, local: bool) -> Step:
        step = Step(key, local=local)
        self.steps[key] = self._owner[key] = step
        return step

    def _show(self, step: Step) -> None:
        if step.digest not in self._shown:
            self._shown.add(step.digest)
            self.shown.append(step)

    def _tell(self, step: Step, count: int = 1) -> None:
        self._news[step.digest] = self._news.get(step.digest, 0) + count

    def _saw(self, moment_ns: int) -> None:
        self._node_ahead = max(self._node_ahead, moment_ns / NANOSECONDS - self._now)


def _goes_on(step: Step) -> bool:
    """Return whether a step is the client's own and has not ended."""
    return step.local and not step.completed
