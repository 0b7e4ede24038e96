"""One index from the indexes of several builders."""

from __future__ import annotations

import json

import pytest

from offload_core.errors import InternalError
from offload_core.imageindex import DOCKER_LIST, OCI_INDEX, join_indexes

A, B, N = (f"sha256:{letter * 64}" for letter in "abc")


def entry(digest: str, machine: str, **more: object) -> dict[str, object]:
    return {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest,
        "size": 481,
        **more,
        "platform": {"architecture": machine, "os": "linux"},
    }


def index(*entries: dict[str, object], **more: object) -> bytes:
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **more}
    return json.dumps(document).encode()


def test_images_come_in_the_order_of_the_request_and_attestations_behind_them() -> None:
    note = entry(N, "unknown", annotations={"vnd.docker.reference.digest": B})
    joined = join_indexes(
        [index(entry(B, "arm64"), note), index(entry(A, "amd64"))], ["linux/amd64", "linux/arm64"]
    )
    assert joined.children == (A, B, N)


def test_the_text_is_the_one_that_buildkit_writes() -> None:
    joined = join_indexes([index(entry(A, "amd64"))], [])
    assert joined.raw.decode() == (
        '{\n  "schemaVersion": 2,\n'
        '  "mediaType": "application/vnd.oci.image.index.v1+json",\n'
        '  "manifests": [\n    {\n'
        '      "mediaType": "application/vnd.oci.image.manifest.v1+json",\n'
        f'      "digest": "{A}",\n      "size": 481,\n'
        '      "platform": {\n        "architecture": "amd64",\n        "os": "linux"\n      }\n'
        "    }\n  ]\n}"
    )


def test_annotations_of_all_parts_are_kept() -> None:
    joined = join_indexes(
        [
            index(entry(A, "amd64"), annotations={"b": "<1>"}),
            index(entry(B, "arm64"), annotations={"a": "2"}),
        ],
        ["linux/amd64", "linux/arm64/v8"],
    )
    assert list(json.loads(joined.raw)["annotations"].items()) == [("a", "2"), ("b", "<1>")]
    assert b"\\u003c1\\u003e" in joined.raw


def test_an_image_that_two_parts_have_is_named_once() -> None:
    joined = join_indexes([index(entry(A, "amd64")), index(entry(A, "amd64"))], ["linux/amd64"])
    assert joined.children == (A,)


def test_docker_lists_stay_docker_lists() -> None:
    part = json.loads(index(entry(A, "amd64"))) | {"mediaType": DOCKER_LIST}
    assert join_indexes([json.dumps(part).encode()], []).media_type == DOCKER_LIST


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"manifests": [{"digest": "x", "size": 1}]}'])
def test_what_is_no_index_is_refused(raw: bytes) -> None:
    with pytest.raises(InternalError, match="image index"):
        join_indexes([raw], [])
