"""Base images pulled through a project's mirror from real registries."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from offload_cache.keys import image_key
from offload_cache.mirror.images import BasePolicy
from offload_cache.mirror.roots import QUIET_SECONDS
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.registry import DockerRegistry
from tests.fixtures.upstreams import (
    TokenService,
    counted,
    make_certificate,
    mirror,
    push_base,
    source_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.upstreams import MirrorClient

EAGER = BasePolicy(recheck_seconds=0.0)
RUSTY = BasePolicy(recheck_seconds=0.0, stale_seconds=0.0)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A registry that asks for the pool's login."""
    with DockerRegistry(tmp_path / "upstream") as registry:
        yield registry


async def test_image_is_pulled_once_with_the_pools_login(upstream, tmp_path):
    image = push_base(upstream, "team/base", "1")
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)]) as client:
        base = f"{upstream.address}/team/base"
        assert await client.digest(f"{base}/manifests/1") == image.digest
        for _ in range(2):
            for layer in image.layers:
                asked = [client.ask(f"{base}/blobs/{layer.digest}") for _ in range(3)]
                for status, body, _ in await asyncio.gather(*asked):
                    assert status == 200
                    assert body == layer.blob
            status, body, headers = await client.ask(f"{base}/manifests/{image.digest}")
            assert status == 200
            assert headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
    for layer in image.layers:
        assert counted(upstream, "GET", layer.digest) == 1
    assert counted(upstream, "HEAD", "/manifests/1") == 1
    assert counted(upstream, "GET", "/manifests/") == 1


async def test_large_layer_comes_in_ranges_and_is_whole(upstream, tmp_path):
    image = push_base(upstream, "team/big", "1", size_bytes=40 << 20)
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)]) as client:
        big = image.layers[-1]
        path = f"{upstream.address}/team/big/blobs/{big.digest}"
        status, _, headers = await client.ask(path, "HEAD")
        assert (status, int(headers["Content-Length"])) == (200, len(big.blob))
        status, body, _ = await client.ask(path)
        assert (status, body == big.blob) == (200, True)
        status, body, headers = await client.ask(path, Range="bytes=1000-1999")
        assert (status, body) == (206, big.blob[1000:2000])
        status, body, headers = await client.ask(path, "HEAD")
        assert int(headers["Content-Length"]) == len(big.blob)
    assert counted(upstream, "GET", big.digest) == 3


async def test_moved_tag_is_seen_after_the_policy_time_and_with_pull_at_once(upstream, tmp_path):
    first = push_base(upstream, "base", "1", "one")
    path = f"{upstream.address}/base/manifests/1"
    policy = BasePolicy(recheck_seconds=600.0)
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)], policy) as client:
        assert await client.digest(path) == first.digest
        second = push_base(upstream, "base", "1", "two")
        assert await client.digest(path) == first.digest
        client.images.recheck()
        assert await client.digest(path) == second.digest
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)], EAGER) as client:
        third = push_base(upstream, "base", "1", "three")
        assert await client.digest(path) == third.digest


async def test_last_meaning_is_served_while_the_registry_is_away_but_not_for_ever(tmp_path):
    registry = DockerRegistry(tmp_path / "upstream")
    path = f"{registry.address}/base/manifests/1"
    with registry:
        image = push_base(registry, "base", "1")
        async with mirror(tmp_path / "node", [source_of(registry, tmp_path)], EAGER) as client:
            blob = f"{registry.address}/base/blobs/{image.layers[0].digest}"
            assert await client.digest(path) == image.digest
            assert await client.status(blob) == 200
    # The node has started again since, too.
    async with mirror(tmp_path / "node", [source_of(registry, tmp_path)], EAGER) as client:
        assert await client.digest(path) == image.digest
        assert await client.status(blob) == 200
        assert client.store.statistics.base_stale_answers == 1
        # Other layers were never pulled.
        assert await client.status(blob.replace(blob[-64:], image.layers[1].digest[7:])) == 404
    async with mirror(tmp_path / "node", [source_of(registry, tmp_path)], RUSTY) as client:
        assert await client.status(path, "HEAD") == 404
        trouble = client.images.explain(f"{registry.address}/base:1: not found")
        assert "not reachable" in str(trouble)


async def test_nodes_share_what_they_pulled_and_what_names_mean(tmp_path):
    registry = DockerRegistry(tmp_path / "upstream")
    path = f"{registry.address}/base/manifests/1"
    objects = DirectoryObjectStore(tmp_path / "shared")
    with registry:
        image = push_base(registry, "base", "1")
        blobs = [f"{registry.address}/base/blobs/{layer.digest}" for layer in image.layers]
        source = source_of(registry, tmp_path)
        async with mirror(tmp_path / "one", [source], objects=objects) as one:
            assert await one.digest(path) == image.digest
            child = json.loads((await one.ask(path))[1])["manifests"][0]["digest"]
            assert await one.status(f"{registry.address}/base/manifests/{child}") == 200
            assert await one.status(blobs[0]) == 200
            await published(one)
        whole = await documents(tmp_path, image.digest, child)
        assert {layer.digest for layer in image.layers} < {key for key, _ in whole[1]["blobs"]}
        assert [image.digest] == [key for key, _ in whole[0]["blobs"]]
        assert whole[1]["name"] == f"{registry.address}/base:1"
        # A node that has pulled less takes nothing away from the document.
        async with mirror(tmp_path / "two", [source], objects=again(tmp_path)) as two:
            assert await two.digest(path) == image.digest
            assert await two.status(f"{registry.address}/base/manifests/{child}") == 200
            assert await two.status(blobs[1]) == 200
            await published(two)
        for before, after in zip(
            whole, await documents(tmp_path, image.digest, child), strict=True
        ):
            assert before["blobs"] == after["blobs"]
        for layer in image.layers:
            assert counted(registry, "GET", layer.digest) == 1
        assert counted(registry, "GET", "/manifests/") == 2
    # A node that is new, while the registry is away.
    async with mirror(tmp_path / "three", [source], objects=again(tmp_path)) as three:
        assert await three.digest(path) == image.digest
        for blob in blobs:
            assert await three.status(blob) == 200


def again(folder: Path) -> DirectoryObjectStore:
    return DirectoryObjectStore(folder / "shared")


async def published(client: MirrorClient) -> None:
    """Wait until the shared store has what a node knows."""
    uploads = client.store.uploads
    assert uploads is not None
    async with asyncio.timeout(10):
        await asyncio.sleep(QUIET_SECONDS)
        while (
            client.images._roots._writing is not None and not client.images._roots._writing.done()
        ):
            await asyncio.sleep(0.02)
        while await uploads.pending_count():
            await asyncio.sleep(0.02)


async def documents(folder: Path, *digests: str) -> list[dict[str, Any]]:
    objects = again(folder)
    try:
        return [
            json.loads(await objects.read_bytes(image_key("web", digest), max_bytes=1 << 20))
            for digest in digests
        ]
    finally:
        await objects.close()


async def test_damaged_layer_and_manifest_are_refused_and_not_kept(upstream, tmp_path):
    image = push_base(upstream, "base", "1")
    damaged = image.layers[0].digest
    for digest in (damaged, image.digest):
        file = upstream.blob_path(digest)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)]) as client:
        base = f"{upstream.address}/base"
        assert await client.status(f"{base}/manifests/1") == 404
        assert await client.status(f"{base}/blobs/{damaged}") == 404
        assert await client.status(f"{base}/blobs/{image.layers[1].digest}") == 200
        disk = (await client.store.project("web")).store.disk
        assert not disk.has(damaged)
        assert not disk.has(image.digest)
        assert [path.name for path in disk.root.rglob("ingest*/*")] == []


async def test_nothing_is_served_that_the_pool_may_not_read(upstream, tmp_path):
    image = push_base(upstream, "private/base", "1")
    async with mirror(tmp_path / "node", [source_of(upstream)]) as client:
        base = f"{upstream.address}/private/base"
        before = len(upstream.requests())
        for path in (
            "manifests/1",
            f"manifests/{image.digest}",
            f"blobs/{image.layers[0].digest}",
            f"blobs/{image.layers[1].digest}",
        ):
            assert await client.status(f"{base}/{path}") == 404
        # A person's own pull asks for many things here; the registry hears of one.
        assert len(upstream.requests()) == before + 1
        assert await client.status("elsewhere.example/base/manifests/1") == 404
        trouble = client.images.explain(f"{base}:1: not found")
        assert trouble is not None
        assert trouble.denied
        assert f"docker login {upstream.address}" in str(trouble)
    # What another repository has brought here is no way around that.
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)]) as client:
        assert await client.status(f"{base}/blobs/{image.layers[0].digest}") == 200
    async with mirror(tmp_path / "node", [source_of(upstream)]) as client:
        assert await client.status(f"{base}/blobs/{image.layers[0].digest}") == 404


async def test_right_that_is_withdrawn_ends_the_service(upstream, tmp_path):
    push_base(upstream, "base", "1")
    path = f"{upstream.address}/base/manifests/1"
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)], EAGER) as client:
        assert await client.status(path) == 200
    async with mirror(tmp_path / "node", [source_of(upstream)], EAGER) as client:
        assert await client.status(path) == 404


async def test_password_is_read_again_when_it_has_changed(upstream, tmp_path):
    push_base(upstream, "base", "1")
    source = source_of(upstream, tmp_path)
    good = (tmp_path / "password").read_text()
    (tmp_path / "password").write_text("wrong")
    path = f"{upstream.address}/base/manifests/1"
    async with mirror(tmp_path / "node", [source], EAGER) as client:
        assert await client.status(path) == 404
        (tmp_path / "password").write_text(good)
        client.images.recheck()
        assert await client.status(path) == 200


async def test_secret_path_of_no_project_or_another_name_is_refused(upstream, tmp_path):
    push_base(upstream, "base", "1")
    async with mirror(tmp_path / "node", [source_of(upstream, tmp_path)]) as client:
        path = f"{upstream.address}/base/manifests/1"
        secret = client.base.rpartition("/v2/")[2].partition("/")[0]
        assert await client.status(path) == 200
        client.base = client.base.replace(secret, "0" * 48)
        assert await client.status(path) == 404
        client.base = client.base.replace("0" * 48, secret)
        for strange in ("../base", "Base", "base/../../x", "base%2f..%2fx", "_"):
            assert await client.status(f"{upstream.address}/{strange}/manifests/1") == 404
        assert await client.status(f"{upstream.address}/base/manifests/-x") == 404
        assert await client.status(f"{upstream.address}/base/blobs/sha512:00") == 404


async def test_tokens_and_tls_with_an_authority_of_ones_own(tmp_path):
    certificate, key, _ = make_certificate(tmp_path / "tls")
    with DockerRegistry(tmp_path / "upstream", auth={}) as open_registry:
        image = push_base(open_registry, "team/base", "1", size_bytes=33 << 20)
    service = TokenService(tmp_path / "tokens")
    async with service.run() as auth:
        with DockerRegistry(tmp_path / "upstream", auth=auth, tls=(certificate, key)) as registry:
            # A login goes to a token service over plain HTTP only where that is configured.
            source = source_of(registry, tmp_path, ca_files=[certificate])
            path = f"{registry.address}/team/base"
            async with mirror(tmp_path / "first", [source]) as client:
                assert await client.status(f"{path}/manifests/1") == 404
            assert service.asked == []
        with DockerRegistry(tmp_path / "upstream", auth=auth) as registry:
            path = f"{registry.address}/team/base"
            async with mirror(tmp_path / "first", [source_of(registry, tmp_path)]) as client:
                assert await client.digest(f"{path}/manifests/1") == image.digest
                for layer in image.layers:
                    assert await client.status(f"{path}/blobs/{layer.digest}") == 200
            assert service.asked == [("repository:team/base:pull", True)]
            async with mirror(tmp_path / "second", [source_of(registry)]) as client:
                assert await client.status(f"{path}/manifests/1") == 404
    with DockerRegistry(tmp_path / "upstream", tls=(certificate, key)) as registry:
        path = f"{registry.address}/team/base"
        trusted = source_of(registry, tmp_path, ca_files=[certificate])
        async with mirror(tmp_path / "third", [trusted]) as client:
            assert await client.digest(f"{path}/manifests/1") == image.digest
            assert await client.status(f"{path}/blobs/{image.layers[-1].digest}") == 200


async def test_registry_that_hangs_is_not_waited_for_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_cache.mirror.connection.HEADER_SECONDS", 0.3)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        registry = DockerRegistry(tmp_path / "upstream")
        registry._port = server.sockets[0].getsockname()[1]
        async with mirror(tmp_path / "node", [source_of(registry)]) as client:
            started = time.monotonic()
            for number in range(5):
                path = f"{registry.address}/base/manifests/{number}"
                assert await client.status(path, "HEAD") == 404
            assert time.monotonic() - started < 2
