"""Caches beside the pool's, as a request names them."""

from __future__ import annotations

import pytest

from offload_builder.buildkit.solve import Attributed
from offload_builder.node.cacheplan import (
    cache_stores,
    check_caches,
    local_export_index,
    other_exports,
    other_imports,
)
from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import BuildSpec, CacheOption

DIGEST = "sha256:" + "a" * 64


def option(kind: str, **attributes: str) -> CacheOption:
    return CacheOption(type=kind, attributes=attributes)


def test_local_caches_are_layouts_of_the_client() -> None:
    spec = BuildSpec(
        cache_imports=[
            option("local", src="_cache0", digest=DIGEST),
            option("registry", ref="user/app"),
        ],
        cache_exports=[option("local", mode="max"), option("inline")],
    )
    check_caches(spec)
    ((store, source),) = cache_stores(spec).items()
    assert source == "oci:_cache0"
    assert other_imports(spec) == [
        Attributed("local", {"src": store, "digest": DIGEST}),
        Attributed("registry", {"ref": "user/app"}),
    ]
    first, second = other_exports(spec, "127.0.0.1:1/secret/image")
    assert first.type == "registry"
    assert first.attributes == {
        "mode": "max",
        "ref": "127.0.0.1:1/secret/image:cache-0",
        "image-manifest": "true",
    }
    assert second == Attributed("inline", {})
    assert [local_export_index(tag) for tag in ("cache-0", "result", "cache-x")] == [0, None, None]


@pytest.mark.parametrize(
    ("imports", "exports"),
    [
        ([option("tape")], []),
        ([option("inline")], []),
        ([option("registry")], []),
        ([option("local", src="/etc", digest=DIGEST)], []),
        ([option("local", src="_cache0", digest="x")], []),
        ([], [option("local", dest="/etc")]),
        # Without keys of the user BuildKit would take those of the node.
        ([option("s3", bucket="b")], []),
        ([], [option("azblob", account_url="https://x/")]),
        ([option("gha", url="https://x/")], []),
        ([option("registry", ref="x" * 20_000)], []),
        ([option("registry", ref="x")] * 17, []),
    ],
)
def test_what_a_request_may_not_have_is_refused(
    imports: list[CacheOption], exports: list[CacheOption]
) -> None:
    with pytest.raises(UsageError):
        check_caches(BuildSpec(cache_imports=imports, cache_exports=exports))
