"""What `offload inspect` shows, laid out as `docker buildx history inspect` does it."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_client.build.networkreport import target, use_json
from offload_client.cli.builds import build_json
from offload_client.cli.tables import between, format_table, rfc3339
from offload_client.progress.cells import printable, visible_line
from offload_core.units import format_duration, format_size
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats, CacheState

if TYPE_CHECKING:
    from offload_proto.v1.builds_service_pb2 import Build
    from offload_proto.v1.events_pb2 import EgressUse, ProgressBatch, Vertex

_CANCELED = "context canceled"
_TAIL_PIECES = 64
_TAIL_LINES = 20
_BASE = re.compile(r"\bFROM (\S+?)@(sha256:[0-9a-f]{64})")
_GIT = re.compile(r"load git source (\S+)")
_HTTP = re.compile(r"^(https?://\S+)$")


@dataclass
class _Step:
    name: str
    seconds: float | None = None
    cached: bool = False
    error: str = ""
    started: bool = False
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL_PIECES))
    """The end of its output."""

    def last_lines(self) -> list[str]:
        """Return the last lines of its output, for a step that failed."""
        if not self.error or self.error.endswith(_CANCELED):
            return []
        lines = b"".join(self.tail).removesuffix(b"\n").split(b"\n")
        return [visible_line(line) for line in lines[-_TAIL_LINES:]] if self.tail else []


class StepList:
    """The steps of a build and what they read, found in its progress; of output only the end."""

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}
        self._egress: dict[tuple[object, ...], EgressUse] = {}
        self.log_bytes = 0

    def take(self, batch: ProgressBatch) -> None:
        """Merge a batch."""
        for vertex in batch.vertices:
            step = self._steps.setdefault(vertex.digest, _Step(vertex.name))
            step.name = vertex.name or step.name
            step.cached = vertex.cached
            step.error = vertex.error
            step.started = step.started or vertex.HasField("started_at")
            if vertex.HasField("started_at") and vertex.HasField("completed_at"):
                step.seconds = max(step.seconds or 0.0, _seconds(vertex))
        for log in batch.logs:
            self.log_bytes += len(log.data)
            step = self._steps.setdefault(log.vertex, _Step(log.vertex))
            step.tail.append(log.data)

        for use in batch.egress:
            self._egress[_key(use)] = use

    def egress(self, *, allowed: bool) -> list[tuple[EgressUse, str]]:
        """Return what was reached in the network, or refused, with the name of its step."""
        return [
            (use, self._steps[use.vertex].name if use.vertex in self._steps else "")
            for use in self._egress.values()
            if use.allowed is allowed
        ]

    @property
    def steps(self) -> list[_Step]:
        """In the order of their first mention."""
        return list(self._steps.values())

    def materials(self) -> list[tuple[str, str]]:
        """Return URI and digest of what was read from elsewhere; a digest may be unknown."""
        found: dict[str, str] = {}
        for step in self.steps:
            if base := _BASE.search(step.name):
                found[f"docker-image://{base[1]}"] = base[2]
            elif source := _GIT.search(step.name) or _HTTP.search(step.name):
                found.setdefault(source[1], "")
        return list(found.items())


def _key(use: EgressUse) -> tuple[object, ...]:
    place = (use.host, use.address, use.port, use.protocol, use.url)
    return (use.vertex, use.allowed, use.rule_id, *place)


def _seconds(vertex: Vertex) -> float:
    nanoseconds = vertex.completed_at.ToNanoseconds() - vertex.started_at.ToNanoseconds()
    return max(0.0, nanoseconds / 1e9)


def as_json(build: Build, steps: StepList) -> dict[str, Any]:
    """Return everything for machines; the first fields are those of `offload builds`."""
    return {
        **build_json(build),
        "materials": [{"uri": uri, "digest": digest} for uri, digest in steps.materials()],
        "steps": [
            {
                "name": step.name,
                "cached": step.cached,
                "seconds": None if step.seconds is None else round(step.seconds, 3),
                "error": step.error,
                "last_output": step.last_lines(),
            }
            for step in steps.steps
        ],
        "network": {
            "policy": _policy_json(build),
            "refused": [use_json(*item) for item in steps.egress(allowed=False)],
            "reached": [use_json(*item) for item in steps.egress(allowed=True)],
        },
        "log_bytes": steps.log_bytes,
    }


def as_text(build: Build, steps: StepList) -> str:
    """Return everything for people."""
    groups = (_origin(build), _course(build, steps), _result(build))
    parts = [text for text in map(_fields, groups) if text]
    if materials := steps.materials():
        read = [(_visible(uri), digest or "-") for uri, digest in materials]
        parts.append("Materials:\n" + format_table(("URI", "DIGEST"), read))
    if refused := steps.egress(allowed=False):
        parts.append(
            "Refused in the network:\n"
            + format_table(
                ("TARGET", "TIMES", "RULE", "STEP"),
                [
                    (_visible(target(use)), str(use.count), use.rule_id, _visible(step) or "-")
                    for use, step in refused
                ],
            )
        )
    if steps.steps:
        rows = _rows(steps, over=build.HasField("completed_at"))
        parts.append("Steps:\n" + format_table(("STATUS", "DURATION", "STEP"), rows))
    parts += [
        "\n".join((f"Last output of {_visible(step.name)}:", *(f"  {line}" for line in lines)))
        for step in steps.steps
        if (lines := step.last_lines())
    ]
    if build.error:
        parts.append(f"Error: {build.error}")
    # What builds and their clients say must not move the cursor of who looks at them.
    return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))


def _origin(build: Build) -> dict[str, str]:
    return {
        "Build": build.build_id,
        "Name": build.name,
        "Project": build.project_id,
        "Member": build.member,
        "Dockerfile": build.dockerfile_path,
        "Target": build.target,
        "Platforms": ", ".join(build.platforms),
        "Part of": f"group {build.group_id}" if build.group_id else "",
        "Network Policy": _policy(build),
        "VCS Branch": build.vcs_branch,
        "VCS Revision": build.vcs_revision,
    }


def _policy(build: Build) -> str:
    """Return the policy that the build has brought, and which ones it narrowed."""
    if not build.HasField("network_policy"):
        return ""
    found = build.network_policy
    within = [
        f"version {version} of the {owner}'s"
        for owner, version in (("pool", found.pool_version), ("project", found.project_version))
        if version
    ]
    file = _visible(found.file)
    return f"{file}, within {' and '.join(within)}" if within else file


def _policy_json(build: Build) -> dict[str, Any] | None:
    if not build.HasField("network_policy"):
        return None
    found = build.network_policy
    return {
        "file": found.file,
        "pool_version": found.pool_version or None,
        "project_version": found.project_version or None,
    }


def _course(build: Build, steps: StepList) -> dict[str, str]:
    stats = build.stats
    total, cached = stats.steps_total, stats.steps_cached
    share = f" ({100 * cached // total}% cached)" if total else ""
    done = sum(step.seconds is not None or step.cached for step in steps.steps)
    saved = stats.saved_milliseconds
    return {
        "Created": rfc3339(build.created_at) or "",
        "Started": rfc3339(build.started_at) or "",
        "Completed": rfc3339(build.completed_at) or "",
        "Duration": between(build.started_at, build.completed_at),
        "Status": _name(BuildState.Name(build.state), "BUILD_STATE_"),
        "Node": build.node_id,
        "Repeat of": build.repeat_of,
        "Repeated as": build.repeated_by,
        "Build Steps": f"{total}{share}" if total else f"{done} done, {len(steps.steps)} known",
        "Time Saved": format_duration(saved / 1000) if saved else "",
        "Warnings": str(stats.warnings) if stats.warnings else "",
    }


def _result(build: Build) -> dict[str, str]:
    stats = build.stats
    saved = "yes, any node can give it" if build.image_saved else ""
    if stats == BuildStats():
        # The node was lost before it told of any numbers.
        return {"Image Digest": build.image_digest, "Image Saved": saved}
    return {
        "Context": f"{stats.context_files} files, {format_size(stats.context_bytes)}, "
        f"{format_size(stats.context_sent_bytes)} sent",
        "Returned": format_size(stats.returned_bytes),
        "Image Digest": build.image_digest,
        "Image Saved": saved,
        "Cache": _cache(build),
    }


def _cache(build: Build) -> str:
    """Return what became of the cache entries; of a build that failed there are none."""
    if build.cache_state == CacheState.CACHE_STATE_UNSPECIFIED:
        return ""
    return _name(CacheState.Name(build.cache_state), "CACHE_STATE_")


def _name(text: str, prefix: str) -> str:
    return text.removeprefix(prefix).lower()


def _rows(steps: StepList, *, over: bool) -> list[tuple[str, str, str]]:
    rows = []
    for step in steps.steps:
        status = "error" if step.error else "cached" if step.cached else "done"
        if status == "done" and step.seconds is None:
            # It may run still; of a build that is over nobody saw its end.
            status = ("stopped" if over else "running") if step.started else "-"
        rows.append(
            (status, "-" if step.seconds is None else f"{step.seconds:.1f}s", _visible(step.name))
        )
    return rows


def _visible(text: str) -> str:
    return visible_line(text.encode())


def _fields(values: dict[str, str]) -> str:
    """Return lines "Name:   value" of those that have one."""
    shown = {name: value for name, value in values.items() if value}
    width = max(map(len, shown), default=0) + 4
    return "\n".join(f"{f'{name}:'.ljust(width)}{value}" for name, value in shown.items())
