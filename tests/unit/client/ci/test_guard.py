"""No line of a build is an order to the system that shows it."""

from __future__ import annotations

import json
import time

import pytest

from offload_client.ci.guard import guard_for, guard_foreign, guard_json

# What .NET ignores when it compares by the rules of a language, among others.
IGNORED = ("", "\u200b", "\u00ad", "\0", "\x1b", "\ufeff", "\u2060")
COMMANDS = ("set-output", "add-mask", "stop-commands", "error", "group")


def github_obeys(log: bytes) -> bool:
    """Read lines and orders as GitHub's runner does (actions/runner ActionCommand.cs)."""
    for line in log.decode("utf-8", "replace").replace("\r", "\n").split("\n"):
        seen = "".join(c for c in line if c not in "".join(IGNORED)).strip()
        if seen.startswith("::") and "::" in seen[2:]:
            return True
        if "##[" in seen and "]" in seen.partition("##[")[2]:
            return True
    return False


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "form",
    [
        "::{c}::x",
        "  ::{c} name=a::x",
        "#1 0.1 50%\r::{c}::x",
        "\u00a0\u3000:{i}:{c}::x",
        "#1 0.1 ok\n{i}:{i}:{c}::x",
        "#1 0.1 ##[{c}]x",
        "#1 0.1 #{i}#{i}[{c}]x",
        "#1 ###[{c}]",
    ],
)
def test_github_obeys_nothing_that_a_build_prints(form: str, command: str, ignored: str) -> None:
    line = form.format(c=command, i=ignored).encode() + b"\n"
    assert github_obeys(line)
    assert not github_obeys(guard_for("github")(line))


def test_other_text_stays_as_it_is() -> None:
    text = b"#5 0.123 std::vector<int> a; ## title [x]\n\x1b[32mok\x1b[0m --- a/file\n50%\r100%\n"
    assert guard_for("github")(text) == text
    assert guard_for("circleci")(text) == text


def test_orders_of_azure_gitlab_and_buildkite_are_harmless() -> None:
    assert (
        guard_for("generic")(b"x ##vso[task.setvariable]y\n") == b"x ##vso\\[task.setvariable]y\n"
    )
    section = b"#1 0.1 \x1b[0Ksection_start:1:a[collapsed=true]\r\x1b[0Kx\n"
    assert b"section_start:" not in guard_for("gitlab")(section)
    assert guard_for("buildkite")(b"--- a\n\x1b[1m+++ b\n---- c\n") == (
        b"\\--- a\n\x1b[1m\\+++ b\n---- c\n"
    )
    assert b"\x1b]" not in guard_for("buildkite")(b"\x1b]1338;url='https://x'\x07\n")


def test_json_keeps_its_meaning() -> None:
    line = json.dumps({"name": "RUN echo ##[add-mask]a"}).encode()
    guarded = guard_json(line)
    assert not github_obeys(guarded)
    assert json.loads(guarded) == json.loads(line)


def test_a_person_sees_what_was_printed() -> None:
    assert guard_foreign({}, "::error::x") == "::error::x"
    assert guard_foreign({"GITHUB_ACTIONS": "true"}, "::error::x") == "\\::error::x"


def test_guarding_takes_time_in_proportion_to_its_input() -> None:
    began = time.process_time()
    for line in (b"#" + b" " * 200_000, b"# " * 100_000, b": " * 100_000, b" " * 200_000 + b":x"):
        guard_for("buildkite")(line)
        guard_for("gitlab")(line)
    # In proportion to its square it would be minutes.
    assert time.process_time() - began < 5
