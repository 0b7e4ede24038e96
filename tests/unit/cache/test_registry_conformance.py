"""The endpoints of the OCI distribution specification 1.1, point by point, in an image repository.

`end-N` is the specification's number of an endpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from offload_cache.manifests import DOCKER_MANIFEST, MAX_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST
from offload_core.digest import sha256_digest
from tests.fixtures.cachecontent import descriptor, manifest

if TYPE_CHECKING:
    from tests.fixtures.registryclient import RegistryBench, RegistryClient

UNKNOWN = sha256_digest(b"nobody has this")
SIGNATURE = "application/vnd.example.signature"


async def push_image(client: RegistryClient, tag: str = "v1", layer: bytes = b"layer") -> str:
    """Push a small image and return its digest."""
    await client.push("image", b"config")
    await client.push("image", layer)
    body = manifest(b"config", [layer])
    assert await client.put_manifest(f"image/manifests/{tag}", body) == 201
    return sha256_digest(body)


def referrer(subject: str, artifact_type: str | None, note: str = "") -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"config", "application/vnd.example.config"),
        "layers": [],
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 10},
        "annotations": {"note": note},
    }
    if artifact_type is not None:
        document["artifactType"] = artifact_type
    return json.dumps(document).encode()


def error_code(body: bytes) -> str:
    [error] = json.loads(body)["errors"]
    return str(error["code"])


async def test_end_1_both_spellings_of_the_version_endpoint(client: RegistryClient) -> None:
    for path in ("/v2/", "/v2"):
        assert (await client.call("GET", client.root + path))[0] == 200


async def test_end_2_ranges_of_a_blob(client: RegistryClient) -> None:
    data = bytes(range(100))
    path = f"image/blobs/{await client.push('image', data)}"
    wanted = {
        "bytes=0-0": (206, data[:1], "bytes 0-0/100"),
        "bytes=10-19": (206, data[10:20], "bytes 10-19/100"),
        "bytes=90-": (206, data[90:], "bytes 90-99/100"),
        "bytes=90-1000": (206, data[90:], "bytes 90-99/100"),
        "bytes=-10": (206, data[90:], "bytes 90-99/100"),
        "bytes=-1000": (206, data, "bytes 0-99/100"),
        # What a server may ignore, it ignores.
        "bytes=20-10": (200, data, None),
        "bytes=0-1,5-6": (200, data, None),
        "lines=1-2": (200, data, None),
        "bytes=-": (200, data, None),
    }
    for text, (status, body, content_range) in wanted.items():
        found, headers, received = await client.call("GET", path, headers={"Range": text})
        assert (text, found, received) == (text, status, body)
        assert headers.get("Content-Range") == content_range
        assert headers["Accept-Ranges"] == "bytes"
    for text in ("bytes=100-", "bytes=100-200", "bytes=-0"):
        status, headers, body = await client.call("GET", path, headers={"Range": text})
        assert (text, status, headers["Content-Range"]) == (text, 416, "bytes */100")
        assert error_code(body)
    stale = {"Range": "bytes=0-0", "If-Range": '"other"'}
    assert (await client.call("GET", path, headers=stale))[2] == data
    status, headers, body = await client.call("HEAD", path, headers={"Range": "bytes=0-0"})
    assert (status, headers["Content-Length"], body) == (200, "100", b"")


async def test_end_2_an_empty_blob(client: RegistryClient) -> None:
    path = f"image/blobs/{await client.push('image', b'')}"
    assert (await client.call("GET", path))[::2] == (200, b"")
    assert (await client.call("HEAD", path))[1]["Content-Length"] == "0"
    assert (await client.call("GET", path, headers={"Range": "bytes=0-"}))[0] == 416


async def test_end_2_end_3_what_is_not_there(client: RegistryClient) -> None:
    for path, code in (
        (f"image/blobs/{UNKNOWN}", "BLOB_UNKNOWN"),
        (f"image/manifests/{UNKNOWN}", "MANIFEST_UNKNOWN"),
        ("image/manifests/none", "MANIFEST_UNKNOWN"),
        ("image/manifests/" + "a" * 129, "MANIFEST_UNKNOWN"),
    ):
        status, headers, body = await client.call("GET", path)
        assert (status, error_code(body)) == (404, code)
        assert headers["Content-Type"].startswith("application/json")
        assert (await client.call("HEAD", path))[::2] == (404, b"")
    status, _, body = await client.call("GET", "image/blobs/sha512:" + "0" * 128)
    assert (status, error_code(body)) == (400, "DIGEST_INVALID")
    # A blob that is no manifest.
    layer = await client.push("image", os.urandom(100))
    assert (await client.call("GET", f"image/manifests/{layer}"))[0] == 404


async def test_end_3_head_and_conditions_of_a_manifest(client: RegistryClient) -> None:
    digest = await push_image(client)
    _, headers, body = await client.call("HEAD", "image/manifests/v1")
    size = str(len(manifest(b"config", [b"layer"])))
    assert (headers["Docker-Content-Digest"], headers["Content-Length"]) == (digest, size)
    assert (headers["Content-Type"], body) == (OCI_MANIFEST, b"")
    for path in (f"image/manifests/{digest}", f"image/blobs/{sha256_digest(b'layer')}"):
        _, headers, _ = await client.call("HEAD", path)
        known = {"If-None-Match": f'"x", {headers["ETag"]}'}
        for method in ("GET", "HEAD"):
            status, again, body = await client.call(method, path, headers=known)
            assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
        assert (await client.call("GET", path, headers={"If-None-Match": '"x"'}))[0] == 200


async def test_end_3_what_a_client_does_not_accept_is_not_sent(client: RegistryClient) -> None:
    await push_image(client)
    for accept, status in (
        (f"{OCI_INDEX}, {OCI_MANIFEST};q=0.5", 200),
        ("application/json, */*", 200),
        ("application/*", 200),
        ("", 200),
        (f"{OCI_INDEX}, {DOCKER_MANIFEST}", 404),
    ):
        found = await client.call("GET", "image/manifests/v1", headers={"Accept": accept})
        assert (accept, found[0]) == (accept, status)


async def test_end_3_a_manifest_keeps_the_type_it_was_pushed_with(
    bench: RegistryBench, client: RegistryClient
) -> None:
    await client.push("image", b"config")
    document = json.loads(manifest(b"config", []))
    del document["mediaType"]
    body = json.dumps(document).encode()
    assert await client.put_manifest("image/manifests/v1", body, DOCKER_MANIFEST) == 201
    bench.registry.state(client.capability).held.clear()
    _, headers, again = await client.call("GET", "image/manifests/v1")
    assert (headers["Content-Type"], again) == (DOCKER_MANIFEST, body)


async def test_end_4_end_6_monolithic_pushes(client: RegistryClient) -> None:
    data = os.urandom(3 << 20)
    digest = sha256_digest(data)
    for path in ("image/blobs/uploads/", "image/blobs/uploads"):
        status, headers, _ = await client.call("POST", path)
        assert (status, headers["Range"]) == (202, "0-0")
    assert headers["Location"].endswith(headers["Docker-Upload-UUID"])
    # Without a PATCH, and of a blob that the registry has by then.
    for _ in range(2):
        _, headers, _ = await client.call("POST", "image/blobs/uploads/")
        status, headers, _ = await client.call(
            "PUT", f"{client.root}{headers['Location']}?digest={digest}", data=data
        )
        assert (status, headers["Docker-Content-Digest"]) == (201, digest)
        assert (await client.call("GET", client.root + headers["Location"]))[2] == data
    status, _, body = await client.call(
        "POST", f"image/blobs/uploads/?digest={UNKNOWN}", data=b"something else"
    )
    assert (status, error_code(body)) == (400, "DIGEST_INVALID")
    for query in ("digest=sha512:" + "0" * 128, "digest-algorithm=sha512", "mount=x"):
        status, _, body = await client.call("POST", f"image/blobs/uploads/?{query}")
        assert (query, status, error_code(body)) == (query, 400, "DIGEST_INVALID")


async def test_end_5_a_blob_in_chunks_of_known_and_unknown_place(client: RegistryClient) -> None:
    data = os.urandom(300_000)
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    parts = (data[:100_000], data[100_000:200_000])
    for number, part in enumerate(parts):
        place = {"Content-Range": f"{number * 100_000}-{number * 100_000 + 99_999}"}
        status, headers, _ = await client.call(
            "PATCH", client.root + headers["Location"], data=part, headers=place if number else {}
        )
        assert (status, headers["Range"]) == (202, f"0-{number * 100_000 + 99_999}")
    digest = sha256_digest(data)
    status, headers, _ = await client.call(
        "PUT", f"{client.root}{headers['Location']}?digest={digest}", data=data[200_000:],
        headers={"Content-Range": "bytes 200000-299999/300000"},
    )  # fmt: skip
    assert status == 201
    assert (await client.call("GET", f"image/blobs/{digest}"))[2] == data


async def test_end_5_end_6_a_chunk_out_of_order_does_not_end_the_upload(
    client: RegistryClient,
) -> None:
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    upload = client.root + headers["Location"]
    await client.call("PATCH", upload, data=b"0123456789")
    digest = sha256_digest(b"0123456789abc")
    for method, target in (("PATCH", upload), ("PUT", f"{upload}?digest={digest}")):
        for place in ("11-13", "0-2", "x", "12-11"):
            status, headers, body = await client.call(
                method, target, data=b"abc", headers={"Content-Range": place}
            )
            assert (status, headers["Range"]) == (416, "0-9")
            assert error_code(body) == "BLOB_UPLOAD_INVALID"
            assert client.root + headers["Location"] == upload
    good = {"Content-Range": "10-12"}
    assert (await client.call("PUT", f"{upload}?digest={digest}", data=b"abc", headers=good))[
        0
    ] == 201


async def test_end_5_a_chunk_of_another_length_than_announced_ends_the_upload(
    client: RegistryClient,
) -> None:
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    upload = client.root + headers["Location"]
    status, _, body = await client.call(
        "PATCH", upload, data=b"abc", headers={"Content-Range": "0-9"}
    )
    assert (status, error_code(body)) == (400, "SIZE_INVALID")
    assert (await client.call("GET", upload))[0] == 404


async def test_end_7_an_image_too_large_or_of_another_kind_is_refused(
    client: RegistryClient,
) -> None:
    digest = await push_image(client)
    body = manifest(b"config", [b"layer"])
    path = "image/manifests/v2"
    for data, kind, status in (
        (body + b" " * MAX_MANIFEST_BYTES, OCI_MANIFEST, 413),
        (b"[]", OCI_MANIFEST, 400),
        (b"", OCI_MANIFEST, 400),
        (body, OCI_INDEX, 400),
        (body.replace(b"sha256:", b"sha512:"), OCI_MANIFEST, 400),
        (referrer("no digest", None), OCI_MANIFEST, 400),
    ):
        found, _, answer = await client.call("PUT", path, data=data, headers={"Content-Type": kind})
        assert (found, error_code(answer)) == (status, "MANIFEST_INVALID")
    # Exactly as large as registries have to accept.
    full = body + b" " * (MAX_MANIFEST_BYTES - len(body))
    assert await client.put_manifest(path, full) == 201
    assert (await client.call("GET", path))[2] == full
    status, _, answer = await client.call("PUT", f"image/manifests/{UNKNOWN}", data=body)
    assert (status, error_code(answer)) == (400, "DIGEST_INVALID")
    assert digest != UNKNOWN


async def test_end_7_a_manifest_with_tags_as_parameters(client: RegistryClient) -> None:
    digest = await push_image(client)
    body = manifest(b"config", [b"layer"])
    status, headers, _ = await client.call(
        "PUT", f"image/manifests/{digest}?tag=one&tag=two", data=body
    )
    assert (status, headers["OCI-Tag"]) == (201, "one, two")
    assert (await client.call("GET", "image/manifests/two"))[2] == body
    many = "&".join(f"tag=t{number}" for number in range(101))
    assert (await client.call("PUT", f"image/manifests/{digest}?{many}", data=body))[0] == 414
    assert (await client.call("PUT", f"image/manifests/{digest}?tag=a/b", data=body))[0] == 400


async def test_end_8_tags_come_in_pages_and_in_order(client: RegistryClient) -> None:
    assert json.loads((await client.call("GET", "image/tags/list"))[2])["tags"] == []
    tags = ["B", "_x", "a", "a.b", "a2", "b"]
    for tag in reversed(tags):
        await push_image(client, tag)

    async def page(query: str) -> tuple[list[str], str | None]:
        _, headers, body = await client.call("GET", f"image/tags/list{query}")
        found = json.loads(body)
        assert found["name"] == f"{client.capability}/image"
        return found["tags"], headers.get("Link")

    assert await page("") == (tags, None)
    assert await page("?n=0") == ([], None)
    assert await page("?n=6") == (tags, None)
    assert await page("?last=a") == (tags[3:], None)
    assert await page("?last=aa") == (tags[5:], None)
    assert await page("?n=5&last=zzz") == ([], None)
    found, link = await page("?n=4")
    assert found == tags[:4]
    assert link is not None
    target, relation = link.split("; ")
    assert relation == 'rel="next"'
    assert await page("?" + target.strip("<>").partition("?")[2]) == (tags[4:], None)
    for wrong in ("-1", "x", "1.5", "9" * 30):
        status, _, body = await client.call("GET", f"image/tags/list?n={wrong}")
        assert (status, error_code(body)) == (400, "UNSUPPORTED")


async def test_end_9_a_deleted_tag_leaves_its_manifest(client: RegistryClient) -> None:
    digest = await push_image(client, "v1")
    await push_image(client, "v2")
    assert (await client.call("DELETE", "image/manifests/v1"))[0] == 202
    assert (await client.call("GET", "image/manifests/v1"))[0] == 404
    assert (await client.call("DELETE", "image/manifests/v1"))[0] == 404
    for reference in ("v2", digest):
        assert (await client.call("GET", f"image/manifests/{reference}"))[0] == 200


async def test_end_9_a_deleted_manifest_is_gone_with_its_tags_until_it_is_pushed_again(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await push_image(client, "v1")
    assert (await client.call("DELETE", f"image/manifests/{digest}"))[0] == 202
    for reference in ("v1", digest):
        status, _, body = await client.call("GET", f"image/manifests/{reference}")
        assert (status, error_code(body)) == (404, "MANIFEST_UNKNOWN")
    assert (await client.call("DELETE", f"image/manifests/{digest}"))[0] == 404
    assert bench.registry.exports(client.capability) == []
    # Another build of the project has it as before.
    other = await bench.client()
    assert (await other.call("GET", f"image/manifests/{digest}"))[0] == 200
    await push_image(client, "v1")
    assert (await client.call("GET", "image/manifests/v1"))[0] == 200


async def test_end_10_a_deleted_blob_is_gone_for_this_repository_only(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await client.push("image", b"layer")
    other = await bench.client()
    assert (await client.call("DELETE", f"image/blobs/{digest}"))[0] == 202
    for method in ("GET", "HEAD", "DELETE"):
        assert (await client.call(method, f"image/blobs/{digest}"))[0] == 404
    await client.push("image", b"config")
    status, _, body = await client.call(
        "PUT", "image/manifests/v1", data=manifest(b"config", [b"layer"])
    )
    assert (status, error_code(body)) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert (await other.call("GET", f"image/blobs/{digest}"))[2] == b"layer"
    assert (await client.call("POST", f"image/blobs/uploads/?mount={digest}"))[0] == 201
    assert (await client.call("GET", f"image/blobs/{digest}"))[2] == b"layer"


async def test_end_9_end_10_nothing_is_deleted_from_a_cache(client: RegistryClient) -> None:
    digest = await client.push("cache", b"layer")
    for path in (f"cache/blobs/{digest}", "cache/manifests/export", f"cache/manifests/{digest}"):
        status, headers, body = await client.call("DELETE", path)
        assert (status, error_code(body)) == (405, "UNSUPPORTED")
        assert "GET" in headers["Allow"]
    assert (await client.call("GET", f"cache/blobs/{digest}"))[2] == b"layer"


async def test_end_11_a_blob_of_the_project_is_mounted_from_anywhere_or_nowhere(
    bench: RegistryBench, client: RegistryClient
) -> None:
    digest = await client.push("cache", b"layer")
    other = await bench.client()
    for source in (f"&from={client.capability}/cache", "&from=library/busybox", ""):
        status, headers, _ = await other.call(
            "POST", f"image/blobs/uploads/?mount={digest}{source}"
        )
        assert (status, headers["Docker-Content-Digest"]) == (201, digest)
        assert (await other.call("GET", other.root + headers["Location"]))[2] == b"layer"
    status, headers, _ = await other.call("POST", f"image/blobs/uploads/?mount={UNKNOWN}&from=x")
    assert (status, headers["Range"]) == (202, "0-0")


async def test_end_12_referrers_are_listed_filtered_and_end_with_their_manifest(
    client: RegistryClient,
) -> None:
    digest = await push_image(client)
    path = f"image/referrers/{digest}"

    async def listed(query: str = "") -> tuple[list[dict[str, Any]], Any]:
        status, headers, body = await client.call("GET", path + query)
        assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
        index = json.loads(body)
        assert (index["schemaVersion"], index["mediaType"]) == (2, OCI_INDEX)
        return index["manifests"], headers

    assert (await listed())[0] == []
    signature, plain = referrer(digest, SIGNATURE, "by ada"), referrer(digest, None)
    for body in (signature, plain):
        status, headers, _ = await client.call(
            "PUT", f"image/manifests/{sha256_digest(body)}", data=body
        )
        assert (status, headers["OCI-Subject"]) == (201, digest)
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [],
         "subject": {"mediaType": OCI_MANIFEST, "digest": digest, "size": 1}}
    ).encode()  # fmt: skip
    assert await client.put_manifest("image/manifests/list", index, OCI_INDEX) == 201
    found = {item["digest"]: item for item in (await listed())[0]}
    assert found[sha256_digest(signature)] == {
        "mediaType": OCI_MANIFEST, "digest": sha256_digest(signature), "size": len(signature),
        "artifactType": SIGNATURE, "annotations": {"note": "by ada"},
    }  # fmt: skip
    assert found[sha256_digest(plain)]["artifactType"] == "application/vnd.example.config"
    assert "artifactType" not in found[sha256_digest(index)]
    filtered, headers = await listed(f"?artifactType={SIGNATURE}")
    assert [item["digest"] for item in filtered] == [sha256_digest(signature)]
    assert headers["OCI-Filters-Applied"] == "artifactType"
    await client.call("DELETE", f"image/manifests/{sha256_digest(signature)}")
    assert (await listed(f"?artifactType={SIGNATURE}"))[0] == []
    assert (await client.call("GET", f"cache/referrers/{digest}"))[0] == 200
    status, _, body = await client.call("GET", "image/referrers/v1")
    assert (status, error_code(body)) == (400, "DIGEST_INVALID")


async def test_end_12_many_referrers_come_in_pages(client: RegistryClient) -> None:
    await client.push("image", b"config")
    pushed = []
    for number in range(4):
        body = referrer(UNKNOWN, SIGNATURE, str(number) * 900_000)
        assert await client.put_manifest(f"image/manifests/{sha256_digest(body)}", body) == 201
        pushed.append(sha256_digest(body))
    found: list[str] = []
    target, pages = f"image/referrers/{UNKNOWN}?artifactType={SIGNATURE}", 0
    while target:
        _, headers, body = await client.call("GET", target)
        assert len(body) < MAX_MANIFEST_BYTES
        found += [item["digest"] for item in json.loads(body)["manifests"]]
        link = headers.get("Link", "")
        target = client.root + link.partition(";")[0].strip("<>") if link else ""
        pages += 1
    assert (found, pages) == (sorted(pushed), 2)


async def test_end_13_end_14_progress_and_cancel_of_an_upload(client: RegistryClient) -> None:
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    upload = client.root + headers["Location"]
    await client.call("PATCH", upload, data=b"abc")
    status, headers, _ = await client.call("GET", upload)
    assert (status, headers["Range"], client.root + headers["Location"]) == (204, "0-2", upload)
    assert (await client.call("DELETE", upload))[0] == 204
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        status, _, body = await client.call(method, upload, data=b"abc")
        assert (status, error_code(body)) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_methods_that_an_endpoint_does_not_have(client: RegistryClient) -> None:
    digest = await client.push("image", b"layer")
    for method, path, allowed in (
        ("PUT", f"image/blobs/{digest}", "DELETE,GET,HEAD"),
        ("POST", "image/manifests/v1", "DELETE,GET,HEAD,PUT"),
        ("DELETE", "image/tags/list", "GET,HEAD"),
        ("POST", f"image/referrers/{digest}", "GET,HEAD"),
        ("DELETE", f"{client.root}/v2/", "GET,HEAD"),
    ):
        status, headers, body = await client.call(method, path)
        assert (path, status, headers["Allow"]) == (path, 405, allowed)
        assert error_code(body) == "UNSUPPORTED"
    # Who does not have the capability does not learn that there is such an endpoint.
    status, _, body = await client.call("POST", f"{client.root}/v2/{'0' * 48}/image/manifests/v1")
    assert (status, error_code(body)) == (404, "NAME_UNKNOWN")


async def test_one_blob_pushed_by_many_at_a_time_stays_once(
    bench: RegistryBench, client: RegistryClient
) -> None:
    data = os.urandom(2 << 20)
    digests = await asyncio.gather(*(client.push("image", data) for _ in range(8)))
    assert set(digests) == {sha256_digest(data)}
    store = (await bench.node.project("p")).store
    assert store.disk.used_bytes == len(data)
    assert bench.no_ingests()


@pytest.mark.parametrize("path", ["_catalog", "library/busybox/manifests/latest", "x/tags/list"])
async def test_other_repositories_do_not_exist(client: RegistryClient, path: str) -> None:
    status, _, body = await client.call("GET", f"{client.root}/v2/{path}")
    assert (status, error_code(body)) == (404, "NAME_UNKNOWN")
