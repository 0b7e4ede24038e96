from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_cache.entries import CacheEntry
from offload_cache.keys import blob_key, entry_key, scope_prefix
from offload_cache.manifests import MAX_MANIFEST_BYTES, parse_cache_manifest, select_layers
from offload_cache.s3store import S3Config
from offload_core.digest import sha256_digest
from offload_core.errors import ConfigError, UsageError
from tests.fixtures.cachecontent import cache_manifest, manifest

DIGEST = sha256_digest(b"")


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_no_scope_or_key_leaves_its_place(scope: str, key: str) -> None:
    try:
        name = entry_key("p", scope, key)
    except (UsageError, UnicodeEncodeError):
        return
    head, _, tail = name.rpartition("/")
    assert head + "/" == scope_prefix("p", scope)
    assert head.split("/")[:3] == ["projects", "p", "scopes"]
    assert len(head.split("/")) == 4
    assert tail.endswith(".json")
    assert tail not in {".json", "..json"}


def test_branch_names_with_slashes_are_one_element() -> None:
    assert entry_key("p", "feature/x", "k") == "projects/p/scopes/feature%2Fx/k.json"


@pytest.mark.parametrize("project", ["", "..", "a/b", ".hidden", "x" * 101, "a\0b"])
def test_bad_project_ids_are_refused(project: str) -> None:
    with pytest.raises(UsageError):
        blob_key(project, DIGEST)


def entry(**changes: object) -> CacheEntry:
    values: dict[str, object] = {
        "scope": "main", "key": "k", "manifest_digest": DIGEST, "media_type": "m",
        "size_bytes": 3, "config_digest": DIGEST, "blobs": ((DIGEST, 0),),
        "created_at": datetime(2026, 1, 2, tzinfo=UTC), "build_id": "b", "member": "ada",
    }  # fmt: skip
    return CacheEntry(**{**values, **changes})  # type: ignore[arg-type]


def test_entries_survive_their_document() -> None:
    assert CacheEntry.from_json(entry().to_json()) == entry()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"blobs": [{"digest": "x", "size": 1}]},
        {"blobs": [{"digest": DIGEST, "size": -1}]},
        {"config": "sha256:../../x"},
        {"created_at": "2026-01-02T00:00:00"},
        {"manifest": None},
    ],
)
def test_damaged_entries_are_refused(change: dict[str, object]) -> None:
    document = json.dumps({**json.loads(entry().to_json()), **change}).encode()
    with pytest.raises(UsageError):
        CacheEntry.from_json(document)
    with pytest.raises(UsageError):
        CacheEntry.from_json(b"[" + document)


def test_unlisted_layers_leave_the_rest_of_the_manifest_as_it_is() -> None:
    body = cache_manifest(b"config", [b"one", b"two", b"three"])
    parsed = parse_cache_manifest(body)
    everything = {layer.digest for layer in parsed.layers}
    assert select_layers(parsed, body, everything) is body
    rendered = select_layers(parsed, body, everything - {sha256_digest(b"two")})
    before, after = json.loads(body), json.loads(rendered)
    assert [layer["digest"] for layer in after["layers"]] == [
        sha256_digest(b"one"),
        sha256_digest(b"three"),
    ]
    assert {**before, "layers": 0} == {**after, "layers": 0}


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
