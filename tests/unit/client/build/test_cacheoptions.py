"""--cache-from, --cache-to and --cache-scope."""

from __future__ import annotations

import pytest

from offload_client.build.cacheoptions import CacheOptions, OtherCache, parse_caches
from offload_core.errors import InvalidValueError

KEYS = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "what", "AWS_REGION": "eu-central-1"}


def parse(
    *cache_from: str, to: tuple[str, ...] = (), scope: str = "", **environment: str
) -> CacheOptions:
    return parse_caches(cache_from, to, scope, environment)


def test_nothing_said_leaves_everything_to_the_pool() -> None:
    assert parse() == CacheOptions()


def test_names_of_images_are_registry_caches_each() -> None:
    found = parse("user/app:cache,user/app:main", to=("user/app:cache",))
    assert [cache.attributes for cache in found.imports] == [
        {"ref": "user/app:cache"},
        {"ref": "user/app:main"},
    ]
    assert found.exports == (OtherCache("registry", {"ref": "user/app:cache"}),)


def test_attributes_are_passed_on_and_equal_values_count_once() -> None:
    text = "type=registry,ref=user/app:cache,Mode=max"
    assert parse(to=(text, text)).exports == (
        OtherCache("registry", {"ref": "user/app:cache", "mode": "max"}),
    )


def test_scope_and_further_scopes_belong_to_the_pool() -> None:
    found = parse("type=offload,scope=release", "type=offload", scope="feature")
    assert (found.scope, found.read_scopes, found.imports) == ("feature", ("release",), ())


def test_none_turns_the_cache_of_the_pool_off() -> None:
    found = parse("type=none", "user/app:cache", to=("type=none",))
    assert (found.read_off, found.write_off, len(found.imports)) == (True, True, 1)


def test_github_cache_is_used_where_it_exists_only() -> None:
    assert parse("type=gha").imports == ()
    found = parse("type=gha,scope=x", ACTIONS_RUNTIME_TOKEN="t", ACTIONS_CACHE_URL="https://c/")
    assert found.imports == (OtherCache("gha", {"scope": "x", "token": "t", "url": "https://c/"}),)
    second = parse(
        "type=gha",
        ACTIONS_RUNTIME_TOKEN="t",
        ACTIONS_CACHE_SERVICE_V2="true",
        ACTIONS_RESULTS_URL="https://r/",
    )
    assert second.imports[0].attributes == {"token": "t", "version": "2", "url_v2": "https://r/"}


def test_session_token_goes_with_its_own_keys_only() -> None:
    temporary = KEYS | {"AWS_SESSION_TOKEN": "short"}
    found = parse("type=s3,bucket=b", **temporary).imports[0].attributes
    assert (found["access_key_id"], found["session_token"]) == ("who", "short")
    given = "type=s3,bucket=b,access_key_id=minio,secret_access_key=its"
    assert "session_token" not in parse(given, **temporary).imports[0].attributes


def test_keys_for_s3_come_from_the_environment_and_never_from_the_node() -> None:
    found = parse("type=s3,bucket=b,region=r", **KEYS)
    assert found.imports[0].attributes == {
        "bucket": "b",
        "region": "r",
        "access_key_id": "who",
        "secret_access_key": "what",
    }
    with pytest.raises(InvalidValueError, match="needs access_key_id and secret_access_key"):
        parse("type=s3,bucket=b,region=r")


@pytest.mark.parametrize(
    ("texts", "to", "sentence"),
    [
        (("type=tape",), (), "type must be one of offload, none, registry, local, gha, s3, azblob"),
        (("type=inline",), (), "type must be one of"),
        (("ref=x,mode=max",), (), "type is required"),
        (("type=registry,ref",), (), "invalid value ref"),
        (("type=registry",), (), "type=registry requires ref"),
        (("type=local",), (), "type=local requires src"),
        ((), ("type=local",), "type=local requires dest"),
        ((), ("type=offload,scope=x",), '"scope" has no meaning'),
        (("type=none,scope=x",), (), '"scope" has no meaning'),
        (("type=none", "type=offload,scope=x"), (), "contradict each other"),
        (("type=azblob,account_url=x",), (), "needs secret_access_key"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    texts: tuple[str, ...], to: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        parse(*texts, to=to)
