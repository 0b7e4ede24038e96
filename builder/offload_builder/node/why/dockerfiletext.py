"""The text of a Dockerfile, as far as two of them are to be compared: stages and instructions.

BuildKit has the real parser. What is misread here makes an explanation less exact, nothing else.
Source: the Dockerfile reference, "Format", "Parser directives", "Here-documents".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

STEPS = frozenset(("RUN", "COPY", "ADD", "WORKDIR"))
"""Instructions that BuildKit counts, as in "[build 2/5]"; FROM only where it names an image."""
_DIRECTIVE = re.compile(r"#\s*escape\s*=\s*(\S)\s*", re.IGNORECASE)
_STAGE = re.compile(r"\sAS\s+(\S+)\s*$", re.IGNORECASE)
_HEREDOC = re.compile(r"<<(-?)(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\2")
_NAME = re.compile(
    r"\[(?:(?P<what>[^\]]+) )?(?P<number>\d+)/(?P<count>\d+)\] (?P<text>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` has no comments, continuations are joined."""

    keyword: str
    text: str


@dataclass(slots=True)
class Stage:
    """One stage; its first instruction is FROM."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def steps(self, count: int) -> list[int]:
        """Return the places of the instructions that have a number, first that of step 1.

        Args:
            count: how many steps BuildKit says there are. A stage that begins from scratch or from
                another stage has no step for its FROM.
        """
        places = [
            place
            for place, instruction in enumerate(self.instructions)
            if instruction.keyword in STEPS
        ]
        return [0, *places] if count > len(places) else places

    def before(self, number: int, count: int) -> list[Instruction]:
        """Return the instructions up to and with the step `number` of `count`, from 1 on."""
        places = self.steps(count)
        if number < 1:
            return []
        end = places[number - 1] + 1 if number <= len(places) else len(self.instructions)
        return self.instructions[:end]


@dataclass(slots=True)
class DockerfileText:
    """A Dockerfile: the ARGs before the first FROM, and the stages in order."""

    arguments: list[Instruction] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str) -> Stage | None:
        """Return a stage by the name that BuildKit shows; "" is the only one."""
        if not name and len(self.stages) == 1:
            return self.stages[0]
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True, slots=True)
class StepName:
    """A step's name taken apart: "[linux/arm64 build 2/5] RUN make"."""

    platform: str
    stage: str
    number: int
    count: int
    text: str


def parse_step_name(name: str) -> StepName | None:
    """Return the parts of a step's name, None when it stands for no instruction."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    words = (match["what"] or "").split()
    # Cross-compiled stages have two platforms: "[linux/amd64->arm64 build 2/5]".
    platform = words.pop(0) if words and "/" in words[0] else ""
    return StepName(
        platform, " ".join(words), int(match["number"]), int(match["count"]), match["text"]
    )


def parse_dockerfile(text: str) -> DockerfileText:
    """Return the stages of a Dockerfile."""
    found = DockerfileText()
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            match = _STAGE.search(instruction.text)
            name = match[1].lower() if match else f"stage-{len(found.stages)}"
            found.stages.append(Stage(name, [instruction]))
        elif found.stages:
            found.stages[-1].instructions.append(instruction)
        else:
            found.arguments.append(instruction)
    return found


def _instructions(text: str) -> list[Instruction]:
    escape = "\\"
    if (match := _DIRECTIVE.match(text)) is not None:
        escape = match[1]
    found: list[Instruction] = []
    lines = iter(text.splitlines())
    for line in lines:
        whole = line.strip()
        if not whole or whole.startswith("#"):
            continue
        while whole.endswith(escape):
            following = next(lines, "").strip()
            if following.startswith("#"):
                continue
            whole = f"{whole[:-1].rstrip()} {following}"
        keyword = whole.split(None, 1)[0].upper()
        if keyword in ("RUN", "COPY", "ADD"):
            for dash, _, word in _HEREDOC.findall(whole):
                for body in lines:
                    whole += "\n" + body
                    if (body.lstrip("\t") if dash else body) == word:
                        break
        found.append(Instruction(keyword, whole))
    return found
