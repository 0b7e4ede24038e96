"""Docker's flag syntax: every spelling means the same, wrong ones are named."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_client.build.callrequest import CallRequest
from offload_client.build.options import BuildOptions
from offload_client.build.stepoptions import Resources, StepOptions
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


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--check"], "lint"),
        (["--call=outline", "--check"], "lint"),
        (["--check", "--call=outline"], "outline"),
        (["--check", "--print", "targets"], "targets"),
        (["--print=targets", "--check=true"], "lint"),
        (["--call=outline", "--check=false"], "outline"),
        (["--check", "--call=build"], None),
        (["--check=0"], None),
    ],
)
def test_last_of_the_flags_that_ask_counts(arguments: list[str], name: str | None) -> None:
    call = parsed(*arguments, ".").call
    assert (call.name if call is not None else None) == name


def test_flags_for_steps_are_read() -> None:
    options = parsed(
        "--add-host=a:1.2.3.4", "--network", "none", "--shm-size=1k", "--ulimit", "core=1",
        "--cgroup-parent=p", "--resource", "memory=1m", "--no-cache-filter=s",
        "--annotation", "a=b", "--sbom=true", "-D", "--check", ".",
    )  # fmt: skip
    assert options.steps == StepOptions(
        network="none", hosts=["a=1.2.3.4"], ulimits=["core=1:1"], shm_size_bytes=1024,
        cgroup_parent="p", resources=Resources(memory_bytes=1 << 20),
    )  # fmt: skip
    assert options.no_cache_stages == ["s"]
    assert options.annotations == {"annotation.a": "b"}
    assert options.attestations == {"sbom": ""}
    assert options.debug
    assert options.call == CallRequest("lint")


def test_flags_that_docker_only_tolerates_change_nothing() -> None:
    legacy = [
        "--compress", "--rm", "--force-rm", "--squash=false", "-m1g", "-c", "2",
        "--memory-swap=-1", "--cpu-period=1", "--cpu-quota=-1", "--cpuset-cpus=0",
        "--cpuset-mems=0", "--call=build",
    ]  # fmt: skip
    assert parsed(*legacy, ".") == parsed(".")
    assert [remark[:12] for remark in parsed("--isolation=x", "--builder", "b", ".").remarks] == [
        "isolation fl", "--builder b ",
    ]  # fmt: skip
    with pytest.raises(UsageError, match='invalid argument "x" for "-c, --cpu-shares" flag'):
        parse("-c", "x", ".")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--no-cache", "--no-cache-filter=a"], "cannot currently be used together"),
        (["-q", "--progress=plain"], "progress=plain and quiet cannot be used together"),
        (["--iidfile=x", "-o", "out"], "incompatible with image ID file"),
        (["--policy=filename=x"], "--policy cannot be honoured"),
    ],
)
def test_flags_that_exclude_each_other(arguments: list[str], sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence) as caught:
        parse(*arguments, ".")
    assert caught.value.exit_code == 1


def test_load_and_push_add_an_output_only_where_none_does_it_yet() -> None:
    pushed = parsed("-o", "type=image,compression=zstd", "-o", "out", "--push", ".").outputs
    assert [(output.type, dict(output.attributes)) for output in pushed] == [
        ("registry", {"compression": "zstd"}), ("local", {}),
    ]  # fmt: skip
    assert [out.load for out in parsed("-o", "type=docker", "--load", ".").outputs] == [True]
    both = parsed("-o", "type=docker,dest=x", "--load", "--push", ".").outputs
    assert [(out.type, out.load) for out in both] == [
        ("docker", False), ("registry", False), ("image", True),
    ]  # fmt: skip


def test_environment_gives_defaults() -> None:
    given = parsed(".", SOURCE_DATE_EPOCH="7", DOCKER_DEFAULT_PLATFORM="arm64")
    assert given.build_args == {"SOURCE_DATE_EPOCH": "7"}
    assert given.platforms == ["linux/arm64"]
    said = parsed(
        "--build-arg=SOURCE_DATE_EPOCH=8", "--platform=amd64", ".",
        SOURCE_DATE_EPOCH="7", DOCKER_DEFAULT_PLATFORM="arm64",
    )  # fmt: skip
    assert said.build_args == {"SOURCE_DATE_EPOCH": "8"}
    assert said.platforms == ["linux/amd64"]


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


def test_source_policy_of_the_environment_is_refused_and_not_ignored() -> None:
    with pytest.raises(InvalidValueError, match="EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"):
        parse(".", EXPERIMENTAL_BUILDKIT_SOURCE_POLICY="policy.json")
