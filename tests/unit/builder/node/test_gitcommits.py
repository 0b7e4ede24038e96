"""Which commit a git context over SSH had is read from what `git ls-remote` printed."""

from __future__ import annotations

import pytest

from offload_builder.node.gitcommits import MAX_OUTPUT_BYTES, GitCommits
from offload_proto.v1.build_spec_pb2 import BuildSpec
from offload_proto.v1.events_pb2 import ProgressBatch

A, B, C, D = (letter * 40 for letter in "abcd")
URL = "git@git.example:my/app.git"
OUTPUT = (
    f"ref: refs/heads/trunk\tHEAD\n{A}\tHEAD\n{A}\trefs/heads/trunk\n{B}\trefs/heads/both\n"
    f"{C}\trefs/tags/both\n{C}\trefs/tags/v1\n{D}\trefs/tags/v1^{{}}\n{B}\trefs/pull/1/head\n"
    "From ssh://git.example\n * [new branch] x -> y\n"
)


def pinned(url: str, output: str = OUTPUT, *, name: str = "") -> str:
    commits = GitCommits(BuildSpec(context_url=url))
    batch = ProgressBatch()
    batch.vertices.add(digest="v", name=name or f"[internal] load git source {url}")
    for piece in (output[:50], output[50:]):
        batch.logs.add(vertex="v", data=piece.encode())
    batch.logs.add(vertex="another", data=f"{B}\trefs/heads/trunk\n".encode())
    commits.see(batch)
    return commits.pinned().context_url


@pytest.mark.parametrize(
    ("fragment", "commit"),
    [
        ("", A),
        ("#trunk", A),
        ("#:sub/dir", f"{A}:sub/dir"),
        ("#both", B),
        ("#refs/tags/both", C),
        ("#v1", D),
        ("#v1:sub", f"{D}:sub"),
        ("#refs/tags/v1", D),
        ("#tags/v1", C),
        ("#pull/1/head", B),
    ],
)
@pytest.mark.parametrize("url", [URL, "ssh://git@git.example:2222/my/app.git"])
def test_branch_or_tag_becomes_its_commit(url: str, fragment: str, commit: str) -> None:
    assert pinned(f"{url}{fragment}") == f"{url}#{commit}"


@pytest.mark.parametrize(
    "url",
    [
        f"{URL}#none",
        f"{URL}#{B}",
        f"{URL}?branch=trunk",
        "https://git.example/app.git#trunk",
        "https://user@git.example/app.git#trunk",
    ],
)
def test_what_is_not_told_or_needs_no_key_stays(url: str) -> None:
    assert pinned(url) == url


def test_output_of_other_steps_says_nothing() -> None:
    assert pinned(f"{URL}#trunk", name=f"[1/2] RUN echo {URL}#trunk") == f"{URL}#trunk"


def test_output_is_kept_to_a_bound() -> None:
    long = "x" * MAX_OUTPUT_BYTES + "\n"
    assert pinned(f"{URL}#trunk", OUTPUT + long + long) == f"{URL}#{A}"
    assert pinned(f"{URL}#trunk", long + OUTPUT) == f"{URL}#trunk"


def test_named_contexts_are_pinned_and_the_request_itself_stays() -> None:
    spec = BuildSpec(named_contexts={"lib": f"{URL}#trunk", "base": "docker-image://alpine"})
    commits = GitCommits(spec)
    batch = ProgressBatch()
    batch.vertices.add(digest="v", name=f"[internal] load git source {URL}#trunk")
    batch.logs.add(vertex="v", data=OUTPUT.encode())
    commits.see(batch)
    found = commits.pinned().named_contexts
    assert dict(found) == {"lib": f"{URL}#{A}", "base": "docker-image://alpine"}
    assert spec.named_contexts["lib"] == f"{URL}#trunk"
