"""Documents say what is true: links, paths, make targets, commands, versions, generated parts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from offload_builder.cli.entry import main as offload_builder
from offload_client.ci.scaffold import TEMPLATES
from offload_client.cli.bake import bake_command
from offload_client.cli.build import build_command
from offload_client.cli.offload import offload
from offload_core import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS: dict[str, click.Command] = {
    "offload-build": build_command,
    "offload": offload,
    "offload-builder": offload_builder,
}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# A word in backticks is a path of ours when it begins with a folder of the repository.
FOLDERS = (
    "benchmarks", "builder", "cache", "client", "deploy", "docs", "examples", "proto", "tests",
)  # fmt: skip
MADE_BY_SETUP = ("examples/hello/busybox", "examples/webapp/busybox")
# Folders in which developers and tools work; a reader has none of them.
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:home|root|work|Users|tmp/\w)")

every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


def prose(document: Path) -> str:
    """Return a document without its code blocks."""
    return FENCE.sub("", document.read_text("utf-8"))


def anchors(document: Path) -> set[str]:
    """Return the names of headings as links use them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in HEADING.findall(prose(document))
    }


def shell_lines(document: Path) -> Iterator[str]:
    """Yield the command lines in a document's shell blocks."""
    for language, text in FENCE.findall(document.read_text("utf-8")):
        if language == "sh":
            yield from text.replace("\\\n", " ").splitlines()


def test_there_are_documents() -> None:
    assert len(DOCUMENTS) > 10


@every_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@every_document
def test_paths_in_backticks_exist(document: Path) -> None:
    for word in CODE.findall(prose(document)):
        first = word.partition("/")[0]
        if first not in FOLDERS or "/" not in word or re.search(r"[\s*<>{}:,=]", word):
            continue
        assert (ROOT / word).exists() or word in MADE_BY_SETUP, word


@every_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", prose(document)))
    for line in shell_lines(document):
        named |= set(re.findall(r"^\s*make ([a-z-]+)", line))
    assert named <= targets, named - targets


@every_document
def test_commands_and_their_flags_exist(document: Path) -> None:
    for line in shell_lines(document):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words and words[0] in COMMANDS:
            check_command(COMMANDS[words[0]], words[1:], line)


def check_command(command: click.Command, words: list[str], line: str) -> None:
    """Fail when a command line names a command or a flag that is not there."""
    if command is build_command and words[:1] == ["bake"]:
        command, words = bake_command, words[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        if command.invoke_without_command and (not words or words[0].startswith("-")):
            break
        assert words, line
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command, context = found, click.Context(found, parent=context)
    known = {
        name
        for option in command.get_params(context)
        for name in (*option.opts, *option.secondary_opts)
    }
    for word in words:
        if word == "--":
            break  # the command line of another program
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag != "-":
            assert flag in known, line


@every_document
def test_flags_in_prose_of_a_command_exist(document: Path) -> None:
    for word in CODE.findall(prose(document)):
        words = word.split()
        if len(words) > 1 and words[0] in COMMANDS and words[1].islower():
            check_command(COMMANDS[words[0]], words[1:], word)


@every_document
def test_no_paths_of_a_developer_machine(document: Path) -> None:
    assert not MACHINE_PATH.findall(document.read_text("utf-8"))


@every_document
def test_lines_are_not_too_long_outside_tables_and_blocks(document: Path) -> None:
    for line in prose(document).splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


def test_readme_names_both_commands_that_need_nothing_else() -> None:
    lines = [line.partition("#")[0].strip() for line in shell_lines(ROOT / "README.md")]
    assert "make demo" in lines
    assert "make test" in lines


def test_every_document_is_linked_from_another() -> None:
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in [*DOCUMENTS, *(ROOT / "benchmarks").glob("*.md")]
        for target in LINK.findall(prose(document))
        if not re.match(r"[a-z]+:", target)
    }
    folders = {path / "README.md" for path in linked if path.is_dir()}
    for document in DOCUMENTS:
        assert document in linked | folders | {ROOT / "README.md"}, document


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == VERSION
    assert VERSION in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_client_variable_is_documented() -> None:
    documented = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    used: set[str] = set()
    for path in [*(ROOT / "client").rglob("*.py"), *(ROOT / "builder").rglob("*.py")]:
        # A name that ends in "_" is a prefix, whose variables are in the generated tables.
        used |= set(re.findall(r"""["'](OFFLOAD_[A-Z_]*[A-Z])["']""", path.read_text("utf-8")))
    prefixes = {"OFFLOAD_NODE"}
    assert {name for name in used - prefixes if f"`{name}`" not in documented} == set()


def test_generated_parts_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "generate_docs.py", "--check"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_outdated_part_is_told_and_made_anew(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "deploy" / "generate_docs.py"
    script.write_text((ROOT / "deploy" / "generate_docs.py").read_text("utf-8"))
    shutil.copytree(ROOT / "deploy" / "ci", tmp_path / "deploy" / "ci")
    shutil.copytree(ROOT / "examples" / "egress", tmp_path / "examples" / "egress")
    egress = (f"egress-{part}" for part in ("keys", "kubernetes", "presets", "ranges"))
    names = (*egress, "cli", "errors", "flags", "gateway-config", "identity-keys",
             "node-config", "registry-keys", *(f"ci-{system}" for system in TEMPLATES))  # fmt: skip
    page = tmp_path / "docs" / "page.md"
    page.write_text("".join(f"<!-- generated: {name} -->\nold\n<!-- end -->\n" for name in names))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, text=True, timeout=60
        )

    outdated = run("--check")
    assert outdated.returncode == 1
    assert "make docs" in outdated.stderr
    assert run().returncode == 0
    assert run("--check").returncode == 0
    assert "QUEUE_TIMEOUT" in page.read_text()
    page.write_text("<!-- generated: nonsense -->\n<!-- end -->\n")
    assert "nonsense" in run("--check").stderr
