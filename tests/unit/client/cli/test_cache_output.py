"""What `offload cache` prints, and what it refuses before it asks the gateway."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from offload_client.cli.cacheprune import _filter
from offload_client.cli.cacheusage import usage_json, usage_tables
from offload_client.cli.cachewhy import why_json, why_text
from offload_client.cli.offload import main, offload
from offload_client.invocation import Invocation
from offload_core.errors import ConfigError, UsageError
from offload_proto.v1.cache_service_pb2 import ProjectUsage, StepReason, WhyResult

if TYPE_CHECKING:
    from pathlib import Path


def project() -> ProjectUsage:
    found = ProjectUsage(project_id="shop")
    found.gain.builds, found.gain.steps_total, found.gain.steps_cached = 3, 8, 6
    found.gain.saved.FromMilliseconds(90_500)
    found.usage.shared_bytes = 1_500_000
    found.usage.scopes.add(scope="feature/x", entries=2, layer_bytes=1000, member="ann")
    found.usage.nodes.add(node_id="node-1", blob_bytes=5, blob_keep_bytes=2_000_000)
    return found


def test_usage_is_three_tables():
    projects, scopes, nodes = usage_tables([project()]).split("\n\n")
    assert projects.splitlines()[1].split() == [
        "shop", "3", "75%", "1m30s", "1.5MB", "-", "0B", "-",
    ]  # fmt: skip
    assert scopes.splitlines()[1].split() == [
        "shop", "feature/x", "2", "1kB", "0B", "-", "-", "ann",
    ]  # fmt: skip
    assert "5B of 2MB" in nodes


def test_project_without_builds_has_no_rate():
    assert usage_tables([ProjectUsage(project_id="new")]).splitlines()[1].split() == [
        "new", "0", "-", "-", "0B", "-", "0B", "-",
    ]  # fmt: skip


def test_usage_for_programs_has_plain_numbers():
    found = usage_json(project())
    assert found["gain"]["hit_rate"] == 0.75
    assert found["gain"]["saved_seconds"] == 90.5
    assert found["collected_at"] is None
    assert found["scopes"][0]["layer_bytes"] == 1000


def test_explanation_names_step_reason_and_what_changed():
    result = WhyResult(build_id="b2", earlier_build_id="b1", earlier_member="bob")
    step = result.steps.add(
        number=7, name="[2/3] COPY . .", kind=StepReason.KIND_FILES_CHANGED,
        explanation="1 file changed", details=["main.c"], more_details=2,
    )  # fmt: skip
    step.took.FromMilliseconds(1500)
    assert why_text(result).splitlines() == [
        "Build b2, compared with b1 by bob",
        "",
        "#7 [2/3] COPY . . 1.5s",
        "   1 file changed",
        "     main.c",
        "     ... and 2 more",
    ]
    (shown,) = why_json(result)["steps"]
    assert (shown["kind"], shown["took_seconds"]) == ("files_changed", 1.5)
    assert "All steps came from the cache." in why_text(WhyResult(build_id="b"))


def invocation(folder: Path) -> Invocation:
    return Invocation((), folder, {}, 0, open(os.devnull, "w"), open(os.devnull, "w"))  # noqa: PTH123


@pytest.fixture
def at(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = invocation(tmp_path)
    yield made
    made.stdout.close()
    made.stderr.close()


def test_scope_is_that_of_the_branch_by_default(at: Invocation):
    with pytest.raises(UsageError, match="--scope"):
        _filter(at, None, None, None, all_scopes=False)
    (at.cwd / ".git").mkdir()
    (at.cwd / ".git/HEAD").write_text("ref: refs/heads/topic/a\n")
    assert _filter(at, None, None, None, all_scopes=False).scope == "topic/a"
    everything = _filter(at, None, "7d", "10GB", all_scopes=True)
    assert (everything.scope, everything.all_scopes) == ("", True)
    assert (everything.unused_for.seconds, everything.keep_bytes) == (604_800, 10**10)


def test_scope_by_default_is_the_one_that_builds_write(at: Invocation):
    pipeline = {"GITHUB_ACTIONS": "true", "GITHUB_HEAD_REF": "topic/b", "GITHUB_BASE_REF": "main"}
    assert _filter(replace(at, environment=pipeline), None, None, None, all_scopes=False).scope == (
        "topic/b"
    )
    (at.cwd / ".git").mkdir()
    (at.cwd / ".git/HEAD").write_text("ref: refs/heads/topic/a\n")
    told = replace(at, environment={"OFFLOAD_BRANCH": "release"})
    assert _filter(told, None, None, None, all_scopes=False).scope == "release"


def test_wrong_values_are_refused(at: Invocation):
    with pytest.raises(UsageError, match="exclude"):
        _filter(at, "main", None, None, all_scopes=True)
    with pytest.raises(UsageError, match="keeps nothing"):
        _filter(at, "main", None, "0", all_scopes=False)
    with pytest.raises(ConfigError):
        _filter(at, "main", "soon", None, all_scopes=False)


@pytest.mark.parametrize("command", ["usage", "prune", "promote", "why"])
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]):
    assert main(["cache", command, "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out


def test_shell_completion_knows_the_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COMP_WORDS", "offload cache pr")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("_OFFLOAD_COMPLETE", "bash_complete")
    with pytest.raises(SystemExit):
        offload.main([], "offload", standalone_mode=False)
    assert set(capsys.readouterr().out.split()) == {"plain,prune", "plain,promote"}
