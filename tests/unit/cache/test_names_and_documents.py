from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from offload_cache.contributions import CacheLayer, Contribution, Writer
from offload_cache.keys import (
    blob_key,
    check_contribution_id,
    contribution_key,
    contributions_prefix,
    new_contribution_id,
    packed_key,
    used_key,
    used_prefix,
)
from offload_cache.manifests import MAX_MANIFEST_BYTES, parse_cache_manifest
from offload_cache.s3store import S3Config
from offload_core.digest import sha256_digest
from offload_core.errors import ConfigError, UsageError
from tests.fixtures.cachecontent import manifest

DIGEST = sha256_digest(b"")


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_no_scope_or_key_leaves_its_place(scope: str, key: str) -> None:
    try:
        name = used_key("p", scope, key)
    except (UsageError, UnicodeEncodeError):
        return
    head, _, tail = name.rpartition("/")
    assert head + "/" == used_prefix("p", scope)
    assert head.split("/")[:3] == ["projects", "p", "used"]
    assert len(head.split("/")) == 4
    assert tail not in {"", ".", ".."}
    assert packed_key("p", scope).split("/")[:3] == ["projects", "p", "packed"]
    assert len(packed_key("p", scope).split("/")) == 4


def test_branch_names_with_slashes_are_one_element() -> None:
    assert contributions_prefix("p", "feature/x") == "projects/p/contributions/feature%2Fx/"


def test_newer_contributions_come_first_in_key_order() -> None:
    times = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    names = [new_contribution_id(time, "build") for time in times]
    assert sorted(names) == names[::-1]


@pytest.mark.parametrize("build", ["", "../b", "B", "a/b", "x" * 65])
def test_bad_names_of_contributions_are_refused(build: str) -> None:
    with pytest.raises(UsageError):
        new_contribution_id(datetime(2026, 1, 1, tzinfo=UTC), build)
    with pytest.raises(UsageError):
        contribution_key("p", "main", f"000000000000-{build}")


@pytest.mark.parametrize("project", ["", "..", "a/b", ".hidden", "x" * 101, "a\0b"])
def test_bad_project_ids_are_refused(project: str) -> None:
    with pytest.raises(UsageError):
        blob_key(project, DIGEST)


CONTRIBUTION = Contribution(
    contribution_id=check_contribution_id("00000000002a-b"),
    scope="main",
    key="k",
    created_at=datetime(2026, 1, 2, tzinfo=UTC),
    writer=Writer("b", "ada", "member", "node", "main", "abc"),
    layers=(CacheLayer(DIGEST, 0, "m", {"a": "b"}),),
    records=b'{"records":[]}',
)


def test_contributions_survive_their_document() -> None:
    assert Contribution.from_bytes(CONTRIBUTION.to_bytes()) == CONTRIBUTION


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"id": "../x"},
        {"layers": [{"digest": "x", "size": 1, "mediaType": "m", "annotations": {}}]},
        {"layers": [{"digest": DIGEST, "size": -1, "mediaType": "m", "annotations": {}}]},
        {"layers": [{"digest": DIGEST, "size": 1, "mediaType": "m", "annotations": {"a": 1}}]},
        {"created_at": "2026-01-02T00:00:00"},
        {"writer": None},
    ],
)
def test_damaged_contributions_are_refused(change: dict[str, object]) -> None:
    raw = json.loads(zstandard.ZstdDecompressor().decompress(CONTRIBUTION.to_bytes()))
    for document in (json.dumps({**raw, **change}), "[" + json.dumps(raw)):
        with pytest.raises(UsageError):
            Contribution.from_bytes(zstandard.ZstdCompressor().compress(document.encode()))
    with pytest.raises(UsageError):
        Contribution.from_bytes(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"layers": 3}',
        b'{"config": {"digest": "sha256:zz", "size": 1}}',
        manifest(b"image config", [b"layer"]),
        b'{"manifests": []}',
        b" " * (MAX_MANIFEST_BYTES + 1),
        json.dumps({"config": {"digest": DIGEST, "size": True}}).encode(),
    ],
)
def test_what_is_no_cache_manifest_is_refused(body: bytes) -> None:
    with pytest.raises(UsageError):
        parse_cache_manifest(body)


def test_the_secret_key_is_never_printed() -> None:
    config = S3Config("http://127.0.0.1:9000", "b", "user", "s3cr3t-value")
    assert "s3cr3t" not in repr(config)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9000", "ftp://x", "http://", "http://u:p@h", "http://h/b"]
)
def test_endpoints_that_are_no_plain_url_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        S3Config(url, "b", "u", "s")
