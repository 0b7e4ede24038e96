"""What each node is asked for, and how archives are joined."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from offload_client.build.options import BuildOptions, OutputOption
from offload_client.legs.archives import join_trees
from offload_client.legs.options import check_legs, leg_options, leg_outputs, leg_warning
from offload_core.errors import InternalError, InvalidValueError

TAGS = ["r.example/a/b:1", "r.example/a/b:2", "docker.io/library/c:latest"]


def outputs(*found: OutputOption, **options: object) -> list[OutputOption]:
    whole = BuildOptions(".", **options)  # type: ignore[arg-type]
    return leg_outputs(whole, found, ["linux/arm64"], Path("/t"))


def test_a_leg_pushes_by_digest_and_last() -> None:
    found = outputs(OutputOption("registry"), OutputOption("image", load=True), tags=TAGS)
    assert [output.type for output in found] == ["image", "registry"]
    assert not found[0].load
    assert found[1].attributes == {
        "name": "r.example/a/b,docker.io/library/c", "push-by-digest": "true"
    }  # fmt: skip


def test_archives_of_legs_go_aside_with_their_names() -> None:
    found = outputs(OutputOption("oci", "-"), OutputOption("tar", "x.tar"), tags=TAGS[:1])
    assert [output.dest for output in found] == ["/t/0.tar", "/t/1.tar"]
    assert found[0].attributes == {"name": TAGS[0]}


def test_annotations_for_other_platforms_are_left_out() -> None:
    annotations = {
        "annotation.a": "1", "annotation-manifest[linux/arm64].b": "2",
        "annotation-manifest[linux/amd64].c": "3", "annotation-index.d": "4",
    }  # fmt: skip
    leg = leg_options(BuildOptions(".", annotations=annotations, tags=TAGS), ["linux/arm64"])
    assert set(leg.annotations.values()) == {"1", "2", "4"}
    assert leg.platforms == ["linux/arm64"] and not leg.tags


@pytest.mark.parametrize(
    ("options", "found", "word"),
    [
        ({"detach": True}, [], "--detach"),
        ({}, [OutputOption("registry"), OutputOption("registry")], "one way"),
        ({}, [OutputOption("registry", "", {"push-by-digest": "true"})], "push-by-digest"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    options: dict[str, object], found: list[OutputOption], word: str
) -> None:
    with pytest.raises(InvalidValueError, match=word):
        check_legs(BuildOptions(".", **options), found)  # type: ignore[arg-type]


def test_nothing_is_said_of_an_ordinary_build() -> None:
    assert leg_warning(BuildOptions(".")) == ""


def tree(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_trees_are_joined_to_one_archive(tmp_path: Path) -> None:
    parts = [tree(tmp_path / "0", "a/x", "a/y"), tree(tmp_path / "1", "b/" + "z" * 200)]
    join_trees(parts, tmp_path / "whole")
    with tarfile.open(tmp_path / "whole") as archive:
        assert archive.getnames() == ["a/x", "a/y", "b/" + "z" * 200]
        content = archive.extractfile("a/y")
        assert content is not None and content.read() == b"abc"


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"no archive" * 100)
    with pytest.raises(InternalError, match="damaged"):
        join_trees([tmp_path / "0"], tmp_path / "whole")
