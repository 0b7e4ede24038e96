"""From two traces to sentences: why each step of the later build ran. Pure.

A step of BuildKit is found in a cache by its text, its environment and the content of what it
takes in. So the causes are looked for in this order: its own text, or the digest of its base; a
step before it ran; files that it takes in; for a RUN the environment, which are instructions that
are no steps, and arguments that they declare. What is left is about the cache itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.node.why.changes import (
    changed_arguments,
    first_difference,
    same_stage,
    sources_of,
    touches,
)
from offload_builder.node.why.dockerfiletext import (
    STEPS,
    DockerfileText,
    Instruction,
    Stage,
    StepName,
    parse_dockerfile,
    parse_step_name,
)
from offload_proto.v1.cache_service_pb2 import StepReason

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from offload_builder.node.why.trace import BuildTrace, TracedStep

MAX_DETAILS = 20


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What is known of the cache entry of the earlier build.

    Attributes:
        published_at: when its contribution was there for all nodes; None when it never was.
        removed_at: when it was removed; None when it was not.
    """

    published_at: datetime | None = None
    removed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two builds and what was found out about their difference.

    Attributes:
        now: the build that is explained.
        before: an earlier one; None when there was none.
        paths: by local source, what happened to each path that differs.
        unknown_sources: local sources whose listings could not be compared, with how much of
            them differs.
        facts: about the earlier build's cache entry.
    """

    now: BuildTrace
    before: BuildTrace | None = None
    paths: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unknown_sources: Mapping[str, str] = field(default_factory=dict)
    facts: CacheFacts = CacheFacts()


def explain(comparison: Comparison, wanted: str = "") -> list[StepReason]:
    """Return why steps ran, in the order in which they began.

    Args:
        comparison: the two builds.
        wanted: number or part of the name of a step, which is then told of also when it was
            cached; empty for all that ran.
    """
    explainer = _Explainer(comparison)
    found = []
    for number, step in enumerate(comparison.now.steps, 1):
        if wanted:
            if wanted != str(number) if wanted.isdecimal() else wanted not in step.name:
                continue
        elif step.cached or not step.ended:
            continue
        reason = explainer.reason(step)
        if reason.kind == StepReason.KIND_CACHED and not wanted:
            continue
        reason.number, reason.name = number, step.name
        if step.seconds:
            reason.took.FromMilliseconds(int(step.seconds * 1000))
        found.append(reason)
    return found


class _Explainer:
    def __init__(self, comparison: Comparison) -> None:
        self._all = comparison
        self._now = comparison.now
        self._before = comparison.before
        self._steps = {step.digest: step for step in self._now.steps}
        self._text = parse_dockerfile(self._now.dockerfile)
        self._old_text = parse_dockerfile(self._before.dockerfile if self._before else "")

    def reason(self, step: TracedStep) -> StepReason:
        if step.cached:
            return _reason(StepReason.KIND_CACHED, "it came from the cache")
        if self._now.no_cache:
            return _reason(StepReason.KIND_NOT_WANTED, "the build was started with --no-cache")
        if self._before is None:
            return _reason(
                StepReason.KIND_NEW, "nothing like this build is known to have been built before"
            )
        name = parse_step_name(step.name)
        if name is None:
            return _reason(StepReason.KIND_UNKNOWN, "its name says nothing about it")
        return (
            self._own_text(name)
            or self._earlier_step(step)
            or self._files(name)
            or self._steps_before(name)
            or self._environment(name)
            or self._other_text(name)
            or self._cache()
        )

    def _earlier_step(self, step: TracedStep) -> StepReason | None:
        """Name the nearest step that ran and on which this one builds."""
        waiting, seen = deque(step.inputs), set(step.inputs)
        while waiting:
            found = self._steps.get(waiting.popleft())
            if found is None:
                continue
            if not found.cached and found.ended and not self._same_base(found):
                return _reason(
                    StepReason.KIND_EARLIER_STEP, f"it builds on a step that ran: {found.name}"
                )
            new = [digest for digest in found.inputs if digest not in seen]
            seen.update(new)
            waiting.extend(new)
        return None

    def _same_base(self, step: TracedStep) -> bool:
        """Whether a step only fetched the base that the compared build had, so changed nothing."""
        name = parse_step_name(step.name)
        reason = self._base(name) if name is not None and name.text.startswith("FROM ") else None
        return reason is not None and reason.kind == StepReason.KIND_CACHED

    def _own_text(self, name: StepName) -> StepReason | None:
        """Compare the instruction itself, wherever it stood in its stage."""
        if name.text.startswith("FROM "):
            return self._base(name)
        stages = self._stages(name)
        if stages is None:
            return None
        stage, old = stages
        if old is None:
            return _reason(StepReason.KIND_NEW, f"the stage {stage.name} is new")
        now = stage.before(name.number, name.count)[-1:]
        if not now or now[0] in old.instructions:
            return None
        before = old.before(name.number, name.count)[-1:]
        difference = first_difference(now, before)
        return _reason(StepReason.KIND_TEXT_CHANGED, "the Dockerfile changed here", [difference])

    def _steps_before(self, name: StepName) -> StepReason | None:
        """Compare the steps below: all may be cached, and one may be gone or at another place."""
        stages = self._stages(name)
        if stages is None or stages[1] is None or " --link" in name.text.partition("\n")[0]:
            return None
        now, old = _instructions_before(name, stages[0], stages[1])
        return _changed_before(_steps(now), _steps(old))

    def _environment(self, name: StepName) -> StepReason | None:
        """Compare what stands before a RUN and is no step: ENV, ARG, USER, SHELL and the like."""
        stages = self._stages(name)
        if stages is None or self._before is None or not name.text.startswith("RUN "):
            return None
        stage, old_stage = stages
        if old_stage is None:
            return None
        now, old = _instructions_before(name, stage, old_stage)
        prefix = [*self._text.arguments, *_settings(now)]
        if reason := _changed_before(prefix, [*self._old_text.arguments, *_settings(old)]):
            return reason
        names = changed_arguments(self._now.arguments, self._before.arguments, prefix)
        if not names:
            return None
        return _reason(
            StepReason.KIND_TEXT_CHANGED,
            "a build argument has another value",
            [f"--build-arg {argument}" for argument in names],
        )

    def _stages(self, name: StepName) -> tuple[Stage, Stage | None] | None:
        """Return the stage of a step and the same one of the earlier build; None without texts."""
        if not self._text.stages or not self._old_text.stages:
            return None
        stage = self._text.stage(name.stage)
        return None if stage is None else (stage, same_stage(self._old_text.stages, stage))

    def _base(self, name: StepName) -> StepReason | None:
        if self._before is None:
            return None
        for step in self._before.steps:
            old = parse_step_name(step.name)
            if old is None or (old.stage, old.number, old.platform) != (
                name.stage, name.number, name.platform,
            ):  # fmt: skip
                continue
            if old.text == name.text:
                return _reason(StepReason.KIND_CACHED, "its base is the same image as before")
            image, _, digest = name.text.removeprefix("FROM ").partition("@")
            old_image, _, old_digest = old.text.removeprefix("FROM ").partition("@")
            if image == old_image and digest and old_digest:
                return _reason(
                    StepReason.KIND_BASE_MOVED,
                    f"{image} is another image by now",
                    [f"{old_digest} -> {digest}"],
                )
            return _reason(
                StepReason.KIND_TEXT_CHANGED, "it has another base", [f"{old_image} -> {image}"]
            )
        return None

    def _files(self, name: StepName) -> StepReason | None:
        sources = sources_of(self._instruction(name))
        touched = [
            f"{path} ({what})" if what != "changed" else path
            for source, patterns in sources.items()
            for path, what in self._all.paths.get(source, {}).items()
            if touches(path, patterns)
        ]
        if touched:
            reason = _reason(
                StepReason.KIND_FILES_CHANGED,
                f"{len(touched)} of the files that it takes in differ",
                touched[:MAX_DETAILS],
            )
            reason.more_details = len(touched) - len(reason.details)
            return reason
        if unknown := self._all.unknown_sources.keys() & sources:
            return _reason(
                StepReason.KIND_FILES_CHANGED,
                "files that it may take in differ; which ones is no longer known",
                [self._all.unknown_sources[source] for source in sorted(unknown)],
            )
        return None

    def _instruction(self, name: StepName) -> Instruction:
        stage = self._text.stage(name.stage)
        steps = stage.before(name.number, name.count) if stage is not None else []
        # The name of a COPY has the values of variables.
        copies = name.text.startswith(("COPY ", "ADD "))
        if steps and not (copies and "$" in steps[-1].text):
            return steps[-1]
        return Instruction(name.text.partition(" ")[0].upper(), name.text)

    def _other_text(self, name: StepName) -> StepReason | None:
        """Compare names alone, where the Dockerfile's text is not known or says nothing."""
        if self._before is None:
            return None
        before = [parse_step_name(step.name) for step in self._before.steps]
        same = [
            old for old in before
            if old is not None and (old.stage, old.platform) == (name.stage, name.platform)
        ]  # fmt: skip
        if any(old.text == name.text for old in same):
            return None
        at_place = next((old for old in same if old.number == name.number), None)
        if at_place is None:
            return _reason(StepReason.KIND_NEW, "the compared build had no such step")
        return _reason(
            StepReason.KIND_TEXT_CHANGED,
            "its text is another one",
            [f"{at_place.text[:120]} -> {name.text[:120]}"],
        )

    def _cache(self) -> StepReason:
        """Nothing that the step depends on differs: it is about the cache itself."""
        before, now, facts = self._before, self._now, self._all.facts
        if before is None:
            return _reason(StepReason.KIND_NEW, "nothing like it was built before")
        if now.faults:
            return _reason(
                StepReason.KIND_FAULT, "content of the cache could not be read; it was built again"
            )
        if not now.read_scopes:
            return _reason(StepReason.KIND_NOT_WANTED, "the build read nothing from the cache")
        if before.write_scope and before.write_scope not in now.read_scopes:
            scope = before.write_scope.partition("/")[2]
            return _reason(
                StepReason.KIND_OTHER_SCOPE,
                f"it is in the scope {scope}, which this build does not read",
            )
        if not before.write_scope:
            return _reason(
                StepReason.KIND_OTHER_SCOPE, "the compared build wrote nothing to the cache"
            )
        if facts.removed_at is not None and facts.removed_at <= now.ended_at:
            return _reason(
                StepReason.KIND_COLLECTED,
                f"its entry was removed at {facts.removed_at:%Y-%m-%d %H:%M:%S} UTC",
            )
        late = facts.published_at is None or facts.published_at > now.created_at
        if before.node_id != now.node_id and late and _has_built(before):
            return _reason(
                StepReason.KIND_NOT_UPLOADED,
                f"node {before.node_id} had not uploaded its cache when this build began",
            )
        if now.withheld:
            return _reason(
                StepReason.KIND_COLLECTED,
                f"{now.withheld} layers of the cache were not to be had any more",
            )
        return _reason(
            StepReason.KIND_UNKNOWN,
            "nothing that it depends on is known to differ; secrets, cache mounts and the network "
            "are not compared",
        )


def _has_built(trace: BuildTrace) -> bool:
    """Whether a build had something to add to the cache: a step ran that fetches no base."""
    names = (parse_step_name(step.name) for step in trace.steps if step.ended and not step.cached)
    return any(name is None or not name.text.startswith("FROM ") for name in names)


def _instructions_before(
    name: StepName, stage: Stage, old: Stage
) -> tuple[list[Instruction], list[Instruction]]:
    """Return what stands before a step now, and before the same instruction in the old stage."""
    *now, own = stage.before(name.number, name.count) or [stage.instructions[0]]
    befores = [
        old.instructions[:place] for place, other in enumerate(old.instructions) if other == own
    ]
    # The same instruction may be there twice.
    befores.sort(key=lambda before: (_steps(before) != _steps(now), abs(len(before) - len(now))))
    return now, befores[0] if befores else now


def _steps(instructions: list[Instruction]) -> list[Instruction]:
    return [item for item in instructions if item.keyword in STEPS]


def _settings(instructions: list[Instruction]) -> list[Instruction]:
    return [item for item in instructions if item.keyword not in STEPS and item.keyword != "FROM"]


def _changed_before(now: list[Instruction], old: list[Instruction]) -> StepReason | None:
    difference = first_difference(now, old)
    if not difference:
        return None
    return _reason(StepReason.KIND_TEXT_CHANGED, "the Dockerfile changed before it", [difference])


def _reason(
    kind: StepReason.Kind.ValueType, text: str, details: list[str] | None = None
) -> StepReason:
    return StepReason(kind=kind, explanation=text, details=details or [])


__all__ = ["CacheFacts", "Comparison", "DockerfileText", "explain"]
