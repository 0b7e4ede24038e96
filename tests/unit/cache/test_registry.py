from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from yarl import URL

from offload_cache.contributions import Writer
from offload_cache.images import ImageDocument
from offload_cache.keys import image_key
from offload_cache.manifests import CACHE_CONFIG_TYPE, MAX_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST
from offload_cache.registry import Grant, Registry, RegistryServer
from offload_core.digest import sha256_digest
from tests.fixtures.cachecontent import cache_manifest, descriptor, manifest, step_config
from tests.fixtures.registryclient import MAX_BLOB, RegistryBench, RegistryClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fixtures.registryclient import RegistryBench


async def test_version_endpoint_answers_anyone(bench: RegistryBench) -> None:
    async with bench.http.get(f"http://{bench.server.address}/v2/") as response:
        assert response.status == 200
        assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"


async def test_pushed_blob_is_pulled_whole_in_part_and_by_head(client: RegistryClient) -> None:
    data = os.urandom(3 << 20)
    digest = await client.push("cache", data)
    for repository in ("cache", "image"):
        status, headers, body = await client.call("GET", f"{repository}/blobs/{digest}")
        assert (status, body) == (200, data)
        assert headers["Docker-Content-Digest"] == digest
    status, headers, body = await client.call("HEAD", f"cache/blobs/{digest}")
    assert (status, headers["Content-Length"], body) == (200, str(len(data)), b"")
    status, headers, body = await client.call(
        "GET", f"cache/blobs/{digest}", headers={"Range": "bytes=1000000-"}
    )
    assert (status, body) == (206, data[1000000:])
    assert headers["Content-Range"] == f"bytes 1000000-{len(data) - 1}/{len(data)}"
    status, _, _ = await client.call(
        "GET", f"cache/blobs/{digest}", headers={"Range": f"bytes={len(data)}-"}
    )
    assert status == 416


async def test_chunked_upload_continues_where_it_is(client: RegistryClient) -> None:
    data = os.urandom(100_000)
    digest = sha256_digest(data)
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    upload = client.root + headers["Location"]
    status, headers, _ = await client.call("PATCH", upload, data=data[:60_000])
    assert (status, headers["Range"]) == (202, "0-59999")
    status, headers, _ = await client.call(
        "PATCH", upload, data=b"x" * 10, headers={"Content-Range": "10-19"}
    )
    assert (status, headers["Range"]) == (416, "0-59999")
    status, headers, _ = await client.call("GET", upload)
    assert (status, headers["Range"]) == (204, "0-59999")
    status, _, _ = await client.call(
        "PATCH", upload, data=data[60_000:90_000], headers={"Content-Range": "60000-89999"}
    )
    assert status == 202
    status, _, _ = await client.call("PUT", f"{upload}?digest={digest}", data=data[90_000:])
    assert status == 201
    assert (await client.call("GET", f"image/blobs/{digest}"))[2] == data
    assert (await client.call("GET", upload))[0] == 404


async def test_blob_is_pushed_in_one_request(client: RegistryClient) -> None:
    digest = sha256_digest(b"data")
    status, headers, _ = await client.call(
        "POST", f"image/blobs/uploads/?digest={digest}", data=b"data"
    )
    assert status == 201
    assert (await client.call("GET", client.root + headers["Location"]))[2] == b"data"


async def test_cancelled_upload_is_gone(bench: RegistryBench, client: RegistryClient) -> None:
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    upload = client.root + headers["Location"]
    await client.call("PATCH", upload, data=b"abc")
    assert (await client.call("DELETE", upload))[0] == 204
    assert (await client.call("PATCH", upload, data=b"abc"))[0] == 404
    assert bench.no_ingests()


async def test_wrong_digest_is_refused_and_leaves_nothing(
    bench: RegistryBench, client: RegistryClient
) -> None:
    wrong = sha256_digest(b"other")
    for target in (wrong, "sha256:../../x", "sha512:" + "0" * 128, ""):
        _, headers, _ = await client.call("POST", "cache/blobs/uploads/")
        status, _, body = await client.call(
            "PUT", client.root + headers["Location"], params={"digest": target}, data=b"data"
        )
        assert (status, b"DIGEST_INVALID" in body) == (400, True)
    assert (await client.call("HEAD", f"cache/blobs/{wrong}"))[0] == 404
    assert bench.no_ingests()


@pytest.mark.parametrize("chunked", [True, False])
async def test_oversize_blob_is_refused_without_filling_the_disk(
    bench: RegistryBench, client: RegistryClient, chunked: bool
) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 20)

    _, headers, _ = await client.call("POST", "cache/blobs/uploads/")
    data = body() if chunked else b"x" * (MAX_BLOB + 1)
    try:
        status, _, answer = await client.call(
            "PUT", f"{client.root}{headers['Location']}?digest={sha256_digest(b'')}", data=data
        )
        assert (status, b"SIZE_INVALID" in answer) == (413, True)
    except aiohttp.ClientConnectionError:
        pass  # the server answered and hung up while we were still sending
    async with asyncio.timeout(5):
        while not bench.no_ingests():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "path",
    [
        "cache/blobs/sha256:..%2f..%2f..%2findex.db",
        "cache/blobs/..%2f..%2fboot",
        "cache/blobs/sha256:" + "A" * 64,
        "cache/blobs/uploads/..%2f..%2fx",
        "cache/manifests/..%2f..%2findex.db",
        "image/manifests/sha256:..%2fx",
        "image/manifests/%00",
        "other/blobs/sha256:" + "0" * 64,
        "../v2/_catalog",
    ],
)
async def test_path_tricks_reach_nothing(client: RegistryClient, path: str) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD"):
        url = URL(client.url(path), encoded=True)
        async with client.http.request(method, url, data=b"x") as response:
            assert response.status in {400, 404, 405}, (method, path)


async def test_unknown_and_revoked_capabilities_look_the_same(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await client.push("cache", b"data")
    paths = [f"cache/blobs/{digest}", "cache/manifests/import", "image/tags/list", "x/y", "cache"]
    before = client.capability
    await bench.registry.revoke(before)
    answers = set()
    for capability in (before, "0" * 48, "short", "A" * 48, "0" * 48 + "/x"):
        client.capability = capability
        for path in paths:
            answers.add((await client.call("GET", path))[::2])
        answers.add((await client.call("POST", "cache/blobs/uploads/"))[::2])
    assert len(answers) == 1
    assert answers.pop()[0] == 404


async def test_revoking_ends_open_uploads_and_leases(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await client.push("cache", b"data")
    await client.call("POST", "cache/blobs/uploads/")
    store = (await bench.node.project("p")).store
    assert store.disk._leases[digest] == 1
    await bench.registry.revoke(client.capability)
    assert store.disk._leases[digest] == 0
    assert bench.no_ingests()


async def test_mount_works_between_the_own_repositories_only(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await client.push("cache", b"data")
    own = f"{client.capability}/cache"
    status, headers, _ = await client.call(
        "POST", f"image/blobs/uploads/?mount={digest}&from={own}"
    )
    assert (status, headers["Docker-Content-Digest"]) == (201, digest)
    assert bench.node.statistics.blobs_mounted == 1
    other = await bench.client("q")
    for source in (own, f"{other.capability}/cache", "", "../../p"):
        status, headers, _ = await other.call(
            "POST", f"image/blobs/uploads/?mount={digest}&from={source}"
        )
        assert (status, "Location" in headers) == (202, True)
    assert (await other.call("GET", f"image/blobs/{digest}"))[0] == 404


async def test_cache_export_becomes_the_import_of_the_next_build(
    bench: RegistryBench, client: RegistryClient
) -> None:
    assert (await client.call("GET", "cache/manifests/import"))[0] == 404
    config = step_config("one", layers=[b"layer"])
    await client.push("cache", config)
    await client.push("cache", b"layer")
    body = cache_manifest(config, [b"layer"])
    assert await client.put_manifest("cache/manifests/export", body) == 201
    assert (await client.call("GET", "cache/manifests/export"))[2] == body
    [export] = bench.registry.exports(client.capability)
    assert (export.repository, export.reference) == ("cache", "export")
    assert export.digest == sha256_digest(body)
    assert export.publication is not None
    assert bench.node.uploads is not None
    assert await bench.node.uploads.wait_published(export.publication, 10)

    after = await bench.client()
    status, headers, _ = await after.call("HEAD", "cache/manifests/import")
    assert (status, headers["Content-Type"]) == (200, OCI_MANIFEST)
    digest = headers["Docker-Content-Digest"]
    served = json.loads((await after.call("GET", f"cache/manifests/{digest}"))[2])
    assert [layer["digest"] for layer in served["layers"]] == [sha256_digest(b"layer")]
    records = (await after.call("GET", f"cache/blobs/{served['config']['digest']}"))[2]
    assert json.loads(config)["records"][0] in json.loads(records)["records"]
    assert bench.node.statistics.manifest_hits == 1
    # What is kept for a build in the shared store does not grow with its questions.
    for _ in range(3):
        await after.call("GET", "cache/manifests/import")
    assert bench.node.read_lease is not None
    assert bench.node.read_lease._digests["p"] == {sha256_digest(b"layer"): 1}
    await bench.registry.revoke(after.capability)
    assert not bench.node.read_lease._digests["p"]

    without = await bench.client(may_import=False)
    assert (await without.call("GET", "cache/manifests/import"))[0] == 404
    assert (await without.call("GET", f"cache/manifests/{digest}"))[0] == 404
    elsewhere = await bench.client(read_scopes=("branch",))
    assert (await elsewhere.call("GET", "cache/manifests/import"))[0] == 404


async def test_a_build_without_a_write_scope_may_not_touch_the_cache(bench: RegistryBench) -> None:
    client = await bench.client(write_scope=None)
    assert (await client.call("POST", "cache/blobs/uploads/"))[0] == 403
    body = cache_manifest(b"config", [])
    assert await client.put_manifest("cache/manifests/export", body) == 403
    await client.push("image", b"layer")


async def test_who_may_only_read_pulls_and_pushes_nothing(bench: RegistryBench) -> None:
    await (await bench.client()).push("image", b"layer")
    client = await bench.client(may_push=False)

    assert (await client.call("GET", f"image/blobs/{sha256_digest(b'layer')}"))[0] == 200
    for repository in ("image", "cache"):
        assert (await client.call("POST", f"{repository}/blobs/uploads/"))[0] == 403
        body = cache_manifest(b"config", [])
        assert await client.put_manifest(f"{repository}/manifests/export", body) == 403


async def test_bad_cache_manifests_are_refused(client: RegistryClient) -> None:
    await client.push("cache", b"config")
    path = "cache/manifests/export"
    assert await client.put_manifest(path, b"{}") == 400
    assert await client.put_manifest(path, b"no json") == 400
    assert await client.put_manifest(path, manifest(b"config", [])) == 400
    assert await client.put_manifest(path, cache_manifest(b"unknown", [])) == 404
    assert await client.put_manifest(path, cache_manifest(b"config", []), OCI_INDEX) == 400
    wrong = sha256_digest(b"x")
    assert (
        await client.put_manifest(f"cache/manifests/{wrong}", cache_manifest(b"config", [])) == 400
    )
    assert await client.put_manifest("cache/manifests/a%20b", cache_manifest(b"config", [])) == 400
    huge = cache_manifest(b"config", []) + b" " * MAX_MANIFEST_BYTES
    assert await client.put_manifest(path, huge) == 413
    assert (await client.call("GET", "cache/manifests/import"))[0] == 404


async def test_image_is_pulled_by_tag_and_digest_and_tags_are_listed(
    bench: RegistryBench, client: RegistryClient
) -> None:
    await client.push("image", b"config")
    await client.push("image", b"layer")
    body = manifest(b"config", [b"layer"])
    assert await client.put_manifest("image/manifests/latest", body) == 201
    for reference in ("latest", sha256_digest(body)):
        status, headers, pulled = await client.call("GET", f"image/manifests/{reference}")
        assert (status, pulled, headers["Content-Type"]) == (200, body, OCI_MANIFEST)
    _, _, tags = await client.call("GET", "image/tags/list")
    assert tags == f'{{"name": "{client.capability}/image", "tags": ["latest"]}}'.encode()

    index = (
        b'{"schemaVersion":2,"mediaType":"%s","manifests":[{"mediaType":"%s","digest":"%s","size":%d}]}'
        % (OCI_INDEX.encode(), OCI_MANIFEST.encode(), sha256_digest(body).encode(), len(body))
    )
    assert await client.put_manifest("image/manifests/multi", index, OCI_INDEX) == 201
    later = await bench.client()
    status, headers, pulled = await later.call("GET", f"image/manifests/{sha256_digest(index)}")
    assert (status, pulled, headers["Content-Type"]) == (200, index, OCI_INDEX)
    assert (await later.call("GET", "image/manifests/latest"))[0] == 404


async def test_image_with_missing_content_is_refused(client: RegistryClient) -> None:
    await client.push("image", b"config")
    body = manifest(b"config", [b"layer"])
    assert await client.put_manifest("image/manifests/latest", body) == 404
    await client.push("image", b"layer")
    layer = descriptor(b"layer")
    lying = body.replace(f'"size": {layer["size"]}}}]'.encode(), b'"size": 1}]')
    assert lying != body
    assert await client.put_manifest("image/manifests/latest", lying) == 400
    assert await client.put_manifest("image/manifests/latest", body) == 201


async def test_a_cache_for_a_directory_of_the_client_stays_on_this_node(
    bench: RegistryBench, client: RegistryClient
) -> None:
    config, layer = step_config("one", layers=[b"layer"]), b"layer"
    for blob in (config, layer):
        await client.push("image", blob)
    body = cache_manifest(config, [layer])
    assert await client.put_manifest("image/manifests/cache-0", body) == 201
    assert (await client.call("GET", "image/manifests/cache-0"))[2] == body
    assert bench.node.uploads is not None
    assert await bench.node.uploads.pending_count("p") == 0
    [exported] = bench.registry.exports(client.capability)
    assert exported.publication is None


async def test_an_image_is_served_by_another_node(
    bench: RegistryBench, client: RegistryClient, make_node: Any
) -> None:
    await client.push("image", b"config")
    await client.push("image", b"layer")
    body = manifest(b"config", [b"layer"])
    await client.put_manifest("image/manifests/latest", body)
    [export] = bench.registry.exports(client.capability)
    assert bench.node.uploads is not None
    assert export.publication is not None
    assert await bench.node.uploads.wait_published(export.publication, 10)
    index = (
        b'{"schemaVersion":2,"mediaType":"%s","manifests":[{"mediaType":"%s","digest":"%s","size":%d}]}'
        % (OCI_INDEX.encode(), OCI_MANIFEST.encode(), sha256_digest(body).encode(), len(body))
    )
    await client.put_manifest("image/manifests/multi", index, OCI_INDEX)
    [_, multi] = bench.registry.exports(client.capability)
    assert multi.publication is not None
    assert await bench.node.uploads.wait_published(multi.publication, 10)
    below = {sha256_digest(content) for content in (b"config", b"layer", body)}
    for digest, blobs in ((export.digest, below), (multi.digest, below | {multi.digest})):
        assert bench.node.objects is not None
        key = image_key("p", digest)
        document = ImageDocument.from_bytes(
            await bench.node.objects.read_bytes(key, max_bytes=10_000)
        )
        assert {name for name, _ in document.blobs} == blobs
    async with make_node("two") as two:
        registry = Registry()
        async with RegistryServer(registry, two.statistics) as server:
            grant = Grant(await two.project("p"), (), None, "k", Writer("b", "m", "member"))
            other = RegistryClient(bench.http, server, registry.grant(grant))
            assert (await other.call("GET", f"image/manifests/{export.digest}"))[2] == body
            layer = sha256_digest(b"layer")
            assert (await other.call("GET", f"image/blobs/{layer}"))[2] == b"layer"


async def test_more_uploads_than_a_client_needs_are_refused(client: RegistryClient) -> None:
    statuses = [(await client.call("POST", "image/blobs/uploads/"))[0] for _ in range(65)]
    assert statuses == [202] * 64 + [429]


async def test_two_builds_push_one_blob_at_a_time(bench: RegistryBench) -> None:
    data = os.urandom(2 << 20)
    clients = [await bench.client() for _ in range(4)]
    await asyncio.gather(*(client.push("cache", data) for client in clients))
    store = (await bench.node.project("p")).store
    assert store.disk.used_bytes == len(data)
    assert bench.no_ingests()


async def test_a_client_that_hangs_up_mid_upload_leaves_no_file_after_its_build(
    bench: RegistryBench, client: RegistryClient
) -> None:
    _, headers, _ = await client.call("POST", "cache/blobs/uploads/")
    host, port = bench.server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"PUT {headers['Location']}?digest={sha256_digest(b'')} HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: 1000000\r\n\r\n".encode()
        + b"x" * 1000
    )
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    async with asyncio.timeout(5):
        while not bench.no_ingests():
            await asyncio.sleep(0.01)
    assert reader is not None


def test_cache_config_type_is_the_one_of_buildkit() -> None:
    assert CACHE_CONFIG_TYPE == "application/vnd.buildkit.cacheconfig.v0"
