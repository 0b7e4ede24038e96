"""Dockerfiles taken apart far enough to be compared."""

from __future__ import annotations

import pytest

from offload_builder.node.why.dockerfiletext import StepName, parse_dockerfile, parse_step_name

TEXT = """\
# syntax=docker/dockerfile:1
ARG BASE=alpine
FROM ${BASE} AS Build
# a comment
ENV A=1 \\
    # inside
    B=2
RUN <<EOF
echo one
EOF
COPY --from=other x y

FROM build
WORKDIR /w
"""


def test_stages_have_their_instructions_without_comments() -> None:
    found = parse_dockerfile(TEXT)
    assert [item.text for item in found.arguments] == ["ARG BASE=alpine"]
    assert [stage.name for stage in found.stages] == ["build", "stage-1"]
    assert [item.text for item in found.stages[0].instructions] == [
        "FROM ${BASE} AS Build",
        "ENV A=1  B=2".replace("  ", " "),
        "RUN <<EOF\necho one\nEOF",
        "COPY --from=other x y",
    ]


def test_steps_are_counted_as_buildkit_counts_them() -> None:
    stage = parse_dockerfile(TEXT).stages[0]
    # From an image: the FROM is step 1 of 3.
    assert [item.keyword for item in stage.before(2, 3)] == ["FROM", "ENV", "RUN"]
    assert stage.before(3, 3)[-1].keyword == "COPY"
    # From scratch or a stage: it has no number.
    assert [item.keyword for item in stage.before(1, 2)] == ["FROM", "ENV", "RUN"]
    assert stage.before(0, 2) == []


def test_escape_directive_is_honoured() -> None:
    found = parse_dockerfile("# escape=`\nFROM x\nRUN a `\n b\nRUN c\\\nRUN d\n")
    assert [item.text for item in found.stages[0].instructions] == [
        "FROM x", "RUN a b", "RUN c\\", "RUN d",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("[2/5] RUN make", StepName("", "", 2, 5, "RUN make")),
        ("[build 2/5] RUN make", StepName("", "build", 2, 5, "RUN make")),
        ("[linux/arm64 build 2/5] RUN x", StepName("linux/arm64", "build", 2, 5, "RUN x")),
        (
            "[linux/amd64->arm64 build 1/2] FROM y",
            StepName("linux/amd64->arm64", "build", 1, 2, "FROM y"),
        ),
        ("[internal] load build context", None),
        ("exporting to image", None),
    ],
)
def test_names_of_steps(name: str, expected: StepName | None) -> None:
    assert parse_step_name(name) == expected
