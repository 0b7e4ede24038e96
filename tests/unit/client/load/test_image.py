"""Reading images: platforms, layers, chain ids."""

from __future__ import annotations

import hashlib
import json

import pytest

from offload_client.load.image import (
    chain_ids,
    choose_children,
    read_manifest,
    read_platform_image,
    read_root,
)
from offload_client.load.platform import Platform
from offload_client.load.progress import LoadMeter
from offload_core.errors import ImageLoadError, UsageError
from tests.fixtures.ociimages import ARCHITECTURE, MemorySource, layer

_HERE = Platform("linux", ARCHITECTURE)


def meter() -> LoadMeter:
    return LoadMeter(lambda _: None)


def index_of(source: MemorySource, *architectures: str) -> str:
    images = []
    for architecture in architectures:
        content = [layer({"top": architecture.encode()})]
        images.append((source.add_platform(content, (), architecture)[0], architecture))
    return source.add_index(images)


def test_chain_id_hashes_the_lower_chain_with_the_diff() -> None:
    first, second, third = ("sha256:" + letter * 64 for letter in "abc")
    chains = chain_ids([first, second, third])
    two = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    assert chains[:2] == [first, two]
    assert chains[2] == "sha256:" + hashlib.sha256(f"{two} {third}".encode()).hexdigest()
    assert chain_ids([]) == []


async def test_layers_carry_digest_compression_and_identifiers() -> None:
    source = MemorySource()
    built = source.add_image(
        [layer({"a": b"1"}, "gzip"), layer({"b": b"2"}, "zstd"), layer({"c": b"3"}, "none")]
    )
    root = await read_root(source, built.digest)
    (child,) = choose_children(root, [], _HERE)
    manifest = await read_manifest(source, child.descriptor)
    image = await read_platform_image(source, manifest, meter())
    assert [each.descriptor.compression for each in image.layers] == ["gzip", "zstd", "none"]
    assert [each.descriptor.digest for each in image.layers] == [
        each.digest for each in built.layers
    ]
    diffs = ["sha256:" + hashlib.sha256(each.raw).hexdigest() for each in built.layers]
    assert [each.diff_id for each in image.layers] == diffs
    assert [each.chain_id for each in image.layers] == chain_ids(diffs)
    assert image.platform == _HERE


async def test_attestations_are_not_images() -> None:
    source = MemorySource()
    root = await read_root(source, index_of(source, "amd64"))
    attestation = root.children[1]
    assert attestation.attests == root.children[0].descriptor.digest
    assert choose_children(root, [], Platform("linux", "arm64")) == (root.children[0],)


async def test_engines_platform_is_the_default() -> None:
    source = MemorySource()
    root = await read_root(source, index_of(source, "amd64", "arm64"))
    (child,) = choose_children(root, [], Platform.of("linux", "aarch64"))
    assert child.platform == Platform("linux", "arm64")


async def test_variant_serves_who_did_not_ask_for_one() -> None:
    source = MemorySource()
    first, _ = source.add_platform([layer({"a": b"1"})], (), "amd64")
    second, _ = source.add_platform([layer({"a": b"2"})], (), "amd64")
    digest = str(
        source.add_manifest(
            "application/vnd.oci.image.index.v1+json",
            {
                "manifests": [
                    {**first, "platform": platform("amd64", "v3")},
                    {**second, "platform": platform("amd64", "v1")},
                ]
            },
        )["digest"]
    )
    root = await read_root(source, digest)
    assert choose_children(root, [], Platform("linux", "amd64")) == (root.children[1],)
    assert choose_children(root, [Platform("linux", "amd64", "v3")], _HERE) == (root.children[0],)
    with pytest.raises(ImageLoadError, match="not built for linux/amd64/v2"):
        choose_children(root, [Platform("linux", "amd64", "v2")], _HERE)


def platform(architecture: str, variant: str) -> dict[str, str]:
    return {"os": "linux", "architecture": architecture, "variant": variant}


async def test_missing_platform_names_what_was_built() -> None:
    source = MemorySource()
    root = await read_root(source, index_of(source, "amd64", "arm64"))
    with pytest.raises(ImageLoadError, match="not built for linux/s390x, only for linux/amd64"):
        choose_children(root, [Platform("linux", "s390x")], _HERE)


async def test_damaged_manifest_is_refused() -> None:
    source = MemorySource()
    digest = index_of(source, "amd64")

    class Damaged(MemorySource):
        async def manifest(self, digest: str) -> tuple[str, bytes]:
            media_type, raw = await source.manifest(digest)
            return media_type, raw + b" "

    with pytest.raises(ImageLoadError, match="arrived damaged"):
        await read_root(Damaged(), digest)


@pytest.mark.parametrize(
    "content",
    [
        {"layers": [{"digest": "sha256:" + "a" * 64, "size": 1}]},
        {"layers": [{"mediaType": "x", "digest": "sha256:../../etc", "size": 1}]},
        {"layers": [{"mediaType": "x", "digest": "sha256:" + "a" * 64, "size": -1}]},
        {"layers": "none"},
        {},
    ],
)
async def test_wrong_manifest_is_refused(content: dict[str, object]) -> None:
    source = MemorySource()
    config = {"mediaType": "c", "digest": source.add_blob(b"{}"), "size": 2}
    added = source.add_manifest(
        "application/vnd.oci.image.manifest.v1+json", {"config": config, **content}
    )
    with pytest.raises(ImageLoadError):
        await read_root(source, str(added["digest"]))


async def test_artifact_is_no_image() -> None:
    source = MemorySource()
    added = source.add_manifest("application/vnd.example.thing+json", {})
    with pytest.raises(ImageLoadError, match="is no container image"):
        await read_root(source, str(added["digest"]))


async def test_configuration_with_another_number_of_layers_is_refused() -> None:
    source = MemorySource()
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}}).encode()
    one = layer({"a": b"1"})
    added = source.add_manifest(
        "application/vnd.oci.image.manifest.v1+json",
        {
            "config": {"mediaType": "c", "digest": source.add_blob(config), "size": len(config)},
            "layers": [
                {
                    "mediaType": one.media_type,
                    "digest": source.add_blob(one.blob),
                    "size": len(one.blob),
                }
            ],
        },
    )
    root = await read_root(source, str(added["digest"]))
    assert root.manifest is not None
    with pytest.raises(ImageLoadError, match="lists 1 layers, its configuration 0"):
        await read_platform_image(source, root.manifest, meter())


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("Linux/AMD64", "linux/amd64"),
    ],
)
def test_platforms_have_one_normal_form(text: str, normal: str) -> None:
    assert str(Platform.parse(text)) == normal


@pytest.mark.parametrize("text", ["", "linux", "linux/", "linux/arm/v7/x"])
def test_wrong_platform_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        Platform.parse(text)
