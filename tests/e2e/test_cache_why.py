"""`offload cache why`: which steps of a build ran, and what made them run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

STEPS = (
    "ARG VERSION=none\nENV MODE=fast\nCOPY src /src\n"
    "RUN cat /src/* > /all\nCOPY other /other\nRUN echo $VERSION $MODE > /version\n"
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, "--minio", "--slots", "1") as running:
        yield running


def project(folder: Path, salt: str) -> Path:
    """Write a project whose steps nobody has built."""
    context = make_context(folder, STEPS + f"RUN echo {salt}\n")
    (context / "src").mkdir()
    for name in ("one", "two"):
        (context / "src" / name).write_text(f"{name} {salt}")
    (context / "other").write_text(salt)
    return context


def build(member: Member, *arguments: str | Path) -> str:
    """Build; return the build's id."""
    result = member.build(*arguments)
    assert result.returncode == 0, result.stderr
    return str(member.wait_state("succeeded")["build_id"])


def why(member: Member, *arguments: str) -> dict[str, Any]:
    """Return the explanation."""
    result = member.offload("cache", "why", *arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def reasons(found: dict[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return what kept each step from the cache: instruction, kind, details."""
    return [
        (step["name"].partition("] ")[2], step["kind"], tuple(step["details"]))
        for step in found["steps"]
    ]


def test_first_build_is_new_and_the_second_needs_no_reasons(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    context = project(tmp_path / "first", "first")
    first = build(member, context)
    assert {kind for _, kind, _ in reasons(why(member, first))} == {"new"}
    second = build(member, context)
    found = why(member, second)
    assert found["steps"] == []
    assert found["earlier_build_id"] == first
    assert {step["kind"] for step in why(member, second, "RUN cat")["steps"]} == {"cached"}


def test_changed_file_is_named_and_what_follows_is_a_consequence(
    pool: Pool, tmp_path: Path
) -> None:
    member = pool.member()
    context = project(tmp_path / "files", "files")
    build(member, context)
    (context / "src" / "two").write_text("changed")
    (context / "src" / "three").write_text("new")
    found = reasons(why(member, build(member, context)))
    assert found[0] == ("COPY src /src", "files_changed", ("src/three (added)", "src/two"))
    assert [kind for _, kind, _ in found[1:]] == ["earlier_step"] * (len(found) - 1)
    assert len(found) == 5


def test_changed_argument_and_changed_text(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    context = project(tmp_path / "text", "text")
    build(member, "--build-arg", "VERSION=1", context)
    changed = build(member, "--build-arg", "VERSION=2", context)
    found = reasons(why(member, changed))
    assert (found[0][1], found[0][2]) == ("text_changed", ("--build-arg VERSION",))
    assert "VERSION=2" not in json.dumps(why(member, changed))
    dockerfile = context / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text().replace("MODE=fast", "MODE=slow"))
    found = reasons(why(member, build(member, "--build-arg", "VERSION=2", context)))
    assert found[0][1] == "text_changed"
    assert found[0][2] == ("ENV MODE=fast -> ENV MODE=slow",)


def test_no_cache_is_the_reason_when_it_was_asked_for(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    context = project(tmp_path / "no", "no")
    build(member, context)
    found = reasons(why(member, build(member, "--no-cache", context)))
    assert {kind for _, kind, _ in found} == {"not_wanted"}


def test_other_node_is_asked_for_nothing_and_another_scope_is_named(
    pool: Pool, tmp_path: Path
) -> None:
    member = pool.member()
    context = project(tmp_path / "scope", "scope")
    build(member, "--cache-scope", "feature", context)
    where = member.wait_published()["node_id"]
    holding = member.start(make_context(tmp_path / "busy", "RUN sleep 100\n"))
    try:
        wait_for_text(holding, "RUN sleep 100")
        other = build(member, "--cache-scope", "else", context)
    finally:
        holding.terminate()
        holding.communicate(timeout=60)
    assert member.builds()[0]["node_id"] != where
    found = why(member, other)
    kinds = {step["kind"] for step in found["steps"]}
    assert "other_scope" in kinds
    assert any("feature" in step["explanation"] for step in found["steps"])


def test_unknown_build_and_step_are_one_sentence(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    build_id = build(member, project(tmp_path / "unknown", "unknown"))
    result = member.offload("cache", "why", build_id, "RUN nothing-like-it")
    assert result.returncode == 5, result.stderr
    assert "has no step" in result.stderr
    result = member.offload("cache", "why", "ffffffffffff")
    assert result.returncode == 5, result.stderr
    assert "Traceback" not in result.stderr
