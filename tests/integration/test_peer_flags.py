"""The flags of the installed buildx: each is one of ours, with the same short form."""

from __future__ import annotations

import os
import re
import subprocess

import click
import pytest

from offload_client.cli.build import build_command
from offload_client.cli.furtherflags import LEGACY, OWN
from tests.fixtures.node import TOOLS

FLAG = re.compile(r"^ +(?:(-\w), )?(--[a-z-]+)(?: (\w+))? {2,}", re.MULTILINE)
HIDDEN = (*LEGACY, "--print")


def peer_says(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOLS / "buildx", "build", *arguments], capture_output=True, text=True, timeout=30,
        env={**os.environ, "BUILDX_EXPERIMENTAL": "1"},
    )  # fmt: skip


def ours() -> dict[str, click.Option]:
    options = [option for option in build_command.params if isinstance(option, click.Option)]
    return {max(option.opts, key=len): option for option in options}


def test_every_flag_in_the_help_of_buildx_is_ours_with_its_short_form() -> None:
    listed = FLAG.findall(peer_says("--help").stdout)
    assert len(listed) > 35
    mine = ours()
    assert [name for _, name, _ in listed if name not in mine] == []
    for short, name, kind in listed:
        option = mine[name]
        assert [text for text in option.opts if text != name] == ([short] if short else []), name
        assert option.is_flag == (not kind), name


@pytest.mark.parametrize("name", HIDDEN)
def test_every_hidden_flag_is_one_that_buildx_takes(name: str) -> None:
    option = ours()[name]
    assert option.hidden
    for spelling in option.opts:
        value = () if option.is_flag else ("1",)
        assert peer_says(spelling, *value, "--help").returncode == 0, spelling


def test_flags_that_buildx_does_not_have_are_said_to_be_our_own() -> None:
    # These are of newer versions of buildx than the installed one may be.
    newer = ("--policy", "--resource")
    known = {name for _, name, _ in FLAG.findall(peer_says("--help").stdout)}
    assert ours().keys() - known - set(HIDDEN) - set(newer) == set(OWN)
