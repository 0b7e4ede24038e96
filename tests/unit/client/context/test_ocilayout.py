"""Which blobs of an OCI layout belong to a named context."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_client.context.ocilayout import LayoutReference, LayoutSource, find_image
from offload_client.context.source import DirectorySource
from offload_core.errors import ContextError
from tests.fixtures.ociimages import layer
from tests.fixtures.remotefiles import OciLayout
from tests.fixtures.tarballs import content, entries


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    return OciLayout(tmp_path / "layout")


def blobs(layout: OciLayout, digest: str) -> set[str]:
    directory = DirectorySource(layout.root, index_path=None)
    source = LayoutSource(directory, layout.root, digest)
    found = [entry for entry in entries(source) if entry.sha256]
    for entry in found:
        assert content(source, entry) == (layout.root / entry.path).read_bytes()
    return {entry.path.removeprefix("blobs/").replace("/", ":") for entry in found}


def test_reference_has_path_tag_and_digest() -> None:
    whole = LayoutReference("dir/layout:1.2@sha256:" + "0" * 64)
    assert (whole.path, whole.tag, whole.digest) == ("dir/layout", "1.2", "sha256:" + "0" * 64)
    plain = LayoutReference("layout")
    assert (plain.path, plain.tag, plain.digest) == ("layout", "latest", "")


def test_image_is_found_by_tag_name_digest_or_because_it_is_the_only_one(
    layout: OciLayout,
) -> None:
    one = layout.name(layout.image(layer({"a": b"1"})), tag="one")
    for text in ("x", "x:one", "x:other", f"x@{one}"):
        assert find_image(layout.root, LayoutReference(text)) == one
    two = layout.name(layout.image(layer({"a": b"2"})), tag="latest")
    assert find_image(layout.root, LayoutReference("x")) == two
    assert find_image(layout.root, LayoutReference("x:one")) == one
    three = layout.name(layout.image(layer({"a": b"3"})), tag="3", name="one")
    assert find_image(layout.root, LayoutReference("x:one")) == three


def test_only_what_belongs_to_the_image_is_listed(layout: OciLayout) -> None:
    wanted, other = layer({"a": b"1"}), layer({"a": b"2"})
    descriptor = layout.image(wanted)
    foreign = layout.image(layer({"a": b"3"}), architecture="arm64")
    index = layout.name(layout.index(descriptor, foreign))
    layout.name(layout.image(other), tag="other")
    layout.blob(b"garbage")
    found = blobs(layout, index)
    assert {index, descriptor["digest"], foreign["digest"], wanted.digest} < found
    assert other.digest not in found
    assert len(found) == 7
    # A layout may hold one platform of many.
    layout.path(foreign["digest"]).unlink()
    assert len(blobs(layout, index)) == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x:none", "has 2 images and none with the tag"),
        ("x@sha256:" + "0" * 64, "has no blob sha256:000"),
        ("x@nonsense", "which is not a digest"),
    ],
)
def test_image_that_is_not_there_is_named(layout: OciLayout, text: str, problem: str) -> None:
    for name in "ab":
        layout.name(layout.image(layer({"a": name.encode()})), tag=name)
    with pytest.raises(ContextError) as caught:
        find_image(layout.root, LayoutReference(text))
    assert problem in caught.value.message


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"manifests": 3}', '{"manifests": [{}]}'])
def test_damaged_index_is_an_error(layout: OciLayout, damage: str) -> None:
    (layout.root / "index.json").write_text(damage)
    with pytest.raises(ContextError):
        find_image(layout.root, LayoutReference("x"))
    (layout.root / "index.json").unlink()
    with pytest.raises(ContextError, match="could not read"):
        find_image(layout.root, LayoutReference("x"))


def test_manifest_that_names_files_outside_is_refused(layout: OciLayout) -> None:
    evil = layout.document("m", {"layers": [{"digest": "../../../etc/passwd"}]})
    with pytest.raises(ContextError, match="which is not a digest"):
        blobs(layout, layout.name(evil))
