"""Values of the command line, with docker's meanings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_client.build.options import (
    OUTPUT_TYPES,
    BuildOptions,
    OutputOption,
    parse_build_args,
    parse_labels,
    parse_output,
    parse_platforms,
)
from offload_client.build.spec import effective_outputs
from offload_client.progress.display import parse_progress
from offload_core.errors import InvalidValueError, OffloadError, UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out", OutputOption("local", "out")),
        ("a=b", OutputOption("local", "a=b")),
        ("-", OutputOption("tar", "-")),
        ("type=local,dest=out", OutputOption("local", "out")),
        ("type=tar", OutputOption("tar", "-")),
        ("type=oci", OutputOption("oci", "-")),
        ('type=oci,"dest=a,b"', OutputOption("oci", "a,b")),
        ("TYPE=docker,Dest=x", OutputOption("docker", "x")),
        ("type=docker", OutputOption("image", load=True)),
        ("type=docker,name=app", OutputOption("image", "", {"name": "app"}, load=True)),
        ("type=image", OutputOption("image")),
        ("type=image,push=1", OutputOption("registry")),
        ("type=image,push=False", OutputOption("image")),
        ("type=registry", OutputOption("registry")),
        (
            "type=oci,dest=x,compression=zstd,compression-level=3",
            OutputOption("oci", "x", {"compression": "zstd", "compression-level": "3"}),
        ),
    ],
)
def test_outputs(text: str, expected: OutputOption) -> None:
    assert parse_output(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "needs a value"),
        ("\n", "needs a value"),
        ("a\rb,c", "KEY=VALUE"),
        ("x,y", '"x" is not KEY=VALUE'),
        ("type=foo", "type must be one of"),
        ("dest=out,x=y", "type is required"),
        ("type=local,dest=out,platform-split=true", "platform-split is not supported"),
        ("type=local", "dest is required"),
        ("type=local,dest=-", "stdout"),
        ("type=image,dest=x", "dest is not supported"),
        ("type=oci,tar=false", "tar=false"),
        ("type=image,push=maybe", "push is true or false"),
        ("type=docker,name=A", "lowercase"),
        ("type=oci,annotation.x=\udce9", "UTF-8"),
    ],
)
def test_wrong_outputs_say_what_is_allowed(text: str, problem: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_output(text)
    assert problem in caught.value.message


@given(st.text(max_size=40))
def test_any_output_text_is_an_output_or_a_sentence(text: str) -> None:
    try:
        assert parse_output(text).type in OUTPUT_TYPES
    except OffloadError as error:
        assert error.message


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True), st.text(max_size=9)))
def test_attributes_of_an_output_survive_quoting(attributes: dict[str, str]) -> None:
    for name in ("type", "dest", "name", "push", "tar"):
        attributes.pop(name, None)
    fields = ["type=oci", "dest=f", *(f"{key}={value}" for key, value in attributes.items())]
    text = ",".join('"' + field.replace('"', '""') + '"' for field in fields)
    assert parse_output(text).attributes == attributes


def test_platforms_take_docker_spellings() -> None:
    given = ["linux/amd64,arm64", "x86_64", "linux/arm64/v8", "armhf", "linux/arm", " darwin/arm64"]
    expected = ["linux/amd64", "linux/arm64", "linux/arm/v7", "darwin/arm64"]
    assert parse_platforms(given) == expected
    assert parse_platforms(["linux/arm/v6", "linux/amd64/v3", "aarch64/v9"])[:2] == [
        "linux/arm/v6", "linux/amd64/v3",
    ]  # fmt: skip
    assert len(parse_platforms(["local"])) == 1


@pytest.mark.parametrize("text", ["", "linux/", "a/b/c/d", "linux amd64", "/", "linux/amd64,"])
def test_wrong_platforms(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid platform"):
        parse_platforms([text])


def test_build_args_come_from_the_environment_when_they_have_no_value() -> None:
    environment = {"SET": "1", "EMPTY": ""}
    values = ["A=b=c", "SET", "EMPTY", "MISSING", "SET=2", "X="]
    assert parse_build_args(values, environment) == {"A": "b=c", "SET": "2", "EMPTY": "", "X": ""}


def test_labels_without_a_value_are_empty() -> None:
    assert parse_labels(["a", "b=c"]) == {"a": "", "b": "c"}


@pytest.mark.parametrize("text", ["=x", "", "a=\udcff"])
def test_pairs_that_cannot_travel(text: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_labels([text])
    with pytest.raises(InvalidValueError):
        parse_build_args([text], {})


def test_progress_modes() -> None:
    assert parse_progress("none") == "quiet"
    with pytest.raises(InvalidValueError, match="invalid progress mode"):
        parse_progress("fancy")


def test_an_image_is_kept_where_something_asks_for_its_id() -> None:
    assert effective_outputs(BuildOptions(".")) == []
    for options in (
        BuildOptions(".", tags=["docker.io/library/a:1"]),
        BuildOptions(".", iidfile="x"),
        BuildOptions(".", metadata_file="x"),
        BuildOptions(".", quiet=True),
    ):
        assert effective_outputs(options) == [OutputOption("image")]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (BuildOptions(".", outputs=[OutputOption("registry")]), "tag is needed"),
        (
            BuildOptions(".", outputs=[OutputOption("tar", "-"), OutputOption("oci", "-")]),
            "only one output",
        ),
        (
            BuildOptions(
                ".",
                platforms=["linux/amd64", "linux/arm64"],
                outputs=[OutputOption("docker", "x")],
            ),
            "manifest lists",
        ),
    ],
)
def test_combinations_that_cannot_work(options: BuildOptions, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        effective_outputs(options)
    assert caught.value.exit_code == 1
