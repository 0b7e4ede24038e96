"""From the fields of a target to the options of a build."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from offload_client.bake.request import BakeRequest
from offload_client.bake.targetoptions import FLAGS, FlagParser, check_allow, target_options
from offload_client.build.options import BuildOptions, OutputOption
from offload_client.cli.bake import flag_parser, parse_bake
from offload_client.invocation import Invocation
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture
def invocation(tmp_path: Path):
    with Path(os.devnull).open("w") as stream:
        yield Invocation([], tmp_path, {"HOME": str(tmp_path)}, stream.fileno(), stream, stream)


def options(invocation: Invocation, request: BakeRequest | None = None, **fields: Any):
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return target_options("app", named, request or BakeRequest(), flag_parser(invocation))


def test_fields_mean_what_their_flags_mean(invocation):
    found = options(
        invocation,
        context="src",
        dockerfile="../app.Dockerfile",
        tags=["app:1", "app:2"],
        target="run",
        args={"A": "1=2", "B": None, "C": ""},
        labels={"x": 'a "quoted", text'},
        platforms=["linux/amd64,linux/arm64"],
        contexts={"base": "target:other", "docs": "./docs"},
        output=[{"type": "local", "dest": "out, dir"}, {"type": "docker"}],
        no_cache=True,
        pull=False,
    )
    assert found.path == "src"
    assert found.file == "app.Dockerfile"
    assert found.tags == ["docker.io/library/app:1", "docker.io/library/app:2"]
    assert found.build_args == {"A": "1=2", "C": ""}
    assert found.labels == {"x": 'a "quoted", text'}
    assert found.platforms == ["linux/amd64", "linux/arm64"]
    assert found.contexts == {"docs": "./docs"}
    assert found.outputs == [OutputOption("local", "out, dir"), OutputOption("image", load=True)]
    assert (found.target, found.no_cache, found.pull) == ("run", True, False)


@pytest.mark.parametrize(
    ("context", "dockerfile", "file"),
    [
        (".", "Dockerfile", "Dockerfile"),
        ("/a/b", "x/Dockerfile", "/a/b/x/Dockerfile"),
        ("a", "/abs/Dockerfile", "/abs/Dockerfile"),
        ("https://git.example/x.git", "sub/Dockerfile", "sub/Dockerfile"),
        ("cwd://", "Dockerfile", "Dockerfile"),
        ("a", "https://x.example/Dockerfile", "https://x.example/Dockerfile"),
    ],
)
def test_dockerfile_is_relative_to_the_context(invocation, context, dockerfile, file):
    assert options(invocation, context=context, dockerfile=dockerfile).file == file


def test_inline_dockerfile_is_no_file(invocation):
    found = options(invocation, context=".", dockerfile="no", dockerfile_inline="FROM scratch")
    assert (found.file, found.dockerfile_inline) == ("", "FROM scratch")


def test_caches_are_read_as_the_flags_are(invocation):
    found = options(
        invocation,
        context=".",
        cache_from=[{"type": "registry", "ref": "a/b"}],
        cache_to=[{"type": "local", "dest": "c"}],
    )
    assert [cache.type for cache in found.caches.imports] == ["registry"]
    assert [cache.attributes for cache in found.caches.exports] == [{"dest": "c"}]


def test_field_without_a_flag_is_refused_by_name():
    def parse(arguments: Sequence[str]) -> BuildOptions:
        raise AssertionError(arguments)

    with pytest.raises(OffloadError) as caught:
        target_options(
            "app", {"context": ".", "ssh": [{"id": "default"}]}, BakeRequest(),
            FlagParser(frozenset(FLAGS.values()) - {"--ssh"}, parse),
        )  # fmt: skip
    assert caught.value.message == 'target app: the field "ssh" is not supported yet'


def test_wrong_value_names_its_target(invocation):
    with pytest.raises(OffloadError, match="target app: "):
        options(invocation, context=".", tags=["UPPER"])


def test_entitlement_needs_a_permission(invocation):
    with pytest.raises(OffloadError) as caught:
        options(invocation, context=".", entitlements=["network.host"])
    assert caught.value.hint == "add --allow network.host"
    check_allow(["network.host", "fs.read=/x", "device=a"])
    with pytest.raises(OffloadError):
        check_allow(["everything"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"targets": ["default"], "pull": None}),
        (["a", "--pull=false", "b"], {"targets": ["a", "b"], "pull": False}),
        (["--no-cache", "--check"], {"no_cache": True, "call": "check"}),
        (["-fx", "-f", "y", "--set", "a.b=c"], {"files": ("x", "y"), "overrides": ("a.b=c",)}),
    ],
)
def test_command_line(invocation, words, expected):
    from dataclasses import replace

    found = parse_bake(replace(invocation, arguments=["bake", *words]))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize("words", [["--nosuch"], ["https://git.example/x.git"], ["--allow", "x"]])
def test_wrong_command_line_is_refused(invocation, words):
    from dataclasses import replace

    with pytest.raises(OffloadError):
        parse_bake(replace(invocation, arguments=["bake", *words]))
