"""Docker's flag syntax: every spelling means the same, wrong ones are named."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_client.build.options import BuildOptions
from offload_client.cli.build import parse_build
from offload_client.invocation import Invocation
from offload_core.errors import InvalidValueError, UsageError


def parse(*arguments: str, **environment: str) -> BuildOptions | None:
    streams = io.StringIO(), io.StringIO()
    return parse_build(Invocation(arguments, Path("/"), environment, 0, *streams))


def parsed(*arguments: str, **environment: str) -> BuildOptions:
    options = parse(*arguments, **environment)
    assert options is not None
    return options


@pytest.mark.parametrize(
    "arguments",
    [
        ["-t", "app:1", "."],
        ["-tapp:1", "."],
        ["-t=app:1", "."],
        ["--tag", "app:1", "."],
        ["--tag=app:1", "."],
        [".", "--tag=app:1"],
        [".", "-t", "app:1"],
        ["-t", "app:1", "--", "."],
    ],
)
def test_every_spelling_of_a_value(arguments: list[str]) -> None:
    options = parsed(*arguments)
    assert list(options.tags) == ["docker.io/library/app:1"]
    assert options.path == "."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-q"], True),
        (["-q=true"], True),
        (["--quiet=1"], True),
        (["--quiet=f"], False),
        (["-q", "--quiet=false"], False),
        (["--quiet=false", "-q"], True),
        (["-qt", "app"], True),
        (["-qtapp"], True),
        ([], False),
    ],
)
def test_every_spelling_of_a_switch(arguments: list[str], expected: bool) -> None:
    assert parsed(*arguments, ".").quiet is expected


def test_last_value_of_a_flag_wins_and_lists_grow() -> None:
    options = parsed("--target", "a", "--target=b", "-t", "x", "-t", "y", "-t", "x", ".")
    assert options.target == "b"
    assert list(options.tags) == ["docker.io/library/x:latest", "docker.io/library/y:latest"]


def test_values_may_look_like_flags() -> None:
    options = parsed("--build-arg", "--x=--y", "-f", "-", "--", "-dir")
    assert options.build_args == {"--x": "--y"}
    assert options.file == "-"
    assert options.path == "-dir"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nope", "."], "unknown flag: --nope"),
        (["--ta=x", "."], "unknown flag: --ta"),
        (["-x", "."], "unknown shorthand flag: 'x' in -x"),
        (["-qx", "."], "unknown shorthand flag: 'x' in -qx"),
        (["-tag", "app"], None),
        (["--tag"], "flag needs an argument: --tag"),
        (["-t"], "flag needs an argument: 't' in -t"),
        (["-qt"], "flag needs an argument: 't' in -qt"),
        (["---x", "."], "bad flag syntax: ---x"),
        (["--=x", "."], "bad flag syntax: --=x"),
        (["--load=maybe", "."], 'invalid argument "maybe" for "--load" flag'),
        (["-q=maybe", "."], 'invalid argument "maybe" for "-q, --quiet" flag'),
    ],
)
def test_wrong_flags_are_refused_by_name(arguments: list[str], sentence: str | None) -> None:
    if sentence is None:
        assert list(parsed(*arguments).tags) == ["docker.io/library/ag:latest"]
        return
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert sentence in caught.value.message
    assert caught.value.exit_code == 125


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["-t", "x"]])
def test_exactly_one_path(arguments: list[str]) -> None:
    with pytest.raises(InvalidValueError, match="requires 1 argument") as caught:
        parse(*arguments)
    assert caught.value.exit_code == 1


def test_help_and_version_go_to_the_streams_of_the_invocation() -> None:
    for flag, text in (("--help", "Usage: offload-build"), ("--version", "offload-build, version")):
        out = io.StringIO()
        invocation = Invocation(["-q", flag], Path("/"), {}, 0, out, io.StringIO())
        assert parse_build(invocation) is None
        assert text in out.getvalue()


@given(
    st.lists(
        st.tuples(st.sampled_from(["--target", "--build-arg"]), st.text("ab=- .", min_size=1)),
        max_size=4,
    ),
    st.booleans(),
)
def test_separate_and_joined_values_are_the_same(
    flags: list[tuple[str, str]], path_first: bool
) -> None:
    flags = [(name, f"N{value}") for name, value in flags]
    separate = [word for pair in flags for word in pair]
    joined = [f"{name}={value}" for name, value in flags]
    first, second = ([".", *separate], [*joined, "."]) if path_first else (
        [*separate, "."], [".", *joined]
    )  # fmt: skip
    assert parsed(*first) == parsed(*second)
