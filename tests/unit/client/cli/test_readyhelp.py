"""`offload-build --help` prints what the parser says, at any width, and starts little for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from offload_client.cli.build import build_command

PROGRAM = Path(sys.executable).parent / "offload-build"


def shown(columns: int, *arguments: str) -> str:
    done = subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, timeout=30, check=True,
        env={"PATH": os.environ["PATH"], "COLUMNS": str(columns), "OFFLOAD_RESIDENT": "0"},
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("columns", [60, 80, 90, 100, 200])
@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_what_the_parser_says(columns: int, argument: str) -> None:
    settings = {**build_command.context_settings, "terminal_width": min(columns, 100) - 2}
    context = click.Context(build_command, info_name="offload-build", **settings)
    assert shown(columns, argument) == build_command.get_help(context) + "\n"


def test_help_beside_other_arguments_is_the_same() -> None:
    assert shown(80, "--pull", "--help") == shown(80, "--help")
