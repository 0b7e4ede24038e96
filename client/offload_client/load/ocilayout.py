"""An OCI image layout as one tar stream, with gaps where the engine holds a blob.

For engines with containerd's store that cannot reach this machine's loopback (remote hosts,
virtual machines), and for images without a name. Source: OCI image specification, "Image
Layout"; the annotation io.containerd.image.name is what containerd's importer names images by.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from offload_client.load.ahead import FetchAhead
from offload_client.load.tarstream import TarStream
from offload_core.digest import digest_hex

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from offload_client.bytepipe import BytePipe
    from offload_client.load.engine import Engine
    from offload_client.load.image import Descriptor, Manifest, Root
    from offload_client.load.names import ImageName
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_LAYOUT = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()


async def load_layout(
    engine: Engine,
    source: ImageSource,
    root: Root,
    manifests: Sequence[Manifest],
    names: Sequence[ImageName],
    meter: LoadMeter,
    *,
    leave_out: AbstractSet[str],
) -> set[str]:
    """Load an image as an OCI layout with the given manifests of its index.

    Args:
        engine: an engine with containerd's store.
        source: where the blobs are.
        root: the image's index or manifest; its digest becomes the image's id.
        manifests: what of it is loaded, attestations included.
        names: names for the image; without any it stays nameless ("dangling").
        meter: counts.
        leave_out: digests of blobs that the engine's content store holds.

    Returns:
        Digests of the blobs that were sent.

    Raises:
        EngineError: the engine refused the layout or vanished.
        OffloadError: the image could not be fetched.
    """
    layers = {layer.digest for manifest in manifests for layer in manifest.layers}
    wanted: dict[str, Descriptor] = {
        blob.digest: blob
        for manifest in manifests
        for blob in manifest.blobs
        if blob.digest not in leave_out
    }
    meter.expect(
        sum(blob.size_bytes for blob in wanted.values()), layers=len(layers & wanted.keys())
    )
    meter.enter("receiving")

    async def produce(pipe: BytePipe) -> None:
        tar = TarStream(pipe)
        await tar.add("oci-layout", _LAYOUT)
        await tar.add("index.json", _index(root, names))
        documents = {root.descriptor.digest: root.raw}
        documents.update((manifest.descriptor.digest, manifest.raw) for manifest in manifests)
        for digest, raw in documents.items():
            await tar.add(_path(digest), raw)
        async with FetchAhead(source, list(wanted.values()), meter) as ahead:
            for blob in wanted.values():
                async with aclosing(ahead.next()) as pieces:
                    await tar.add_stream(_path(blob.digest), blob.size_bytes, pieces)
                if blob.digest in layers:
                    meter.layer_received()
        await tar.finish()
        meter.enter("unpacking")

    await engine.load(produce, meter.touch)
    return set(wanted)


def _index(root: Root, names: Sequence[ImageName]) -> bytes:
    entry: dict[str, Any] = {
        "mediaType": root.descriptor.media_type,
        "digest": root.descriptor.digest,
        "size": root.descriptor.size_bytes,
    }
    entries = [
        entry
        | {
            "annotations": {
                "io.containerd.image.name": str(name),
                "org.opencontainers.image.ref.name": name.tag,
            }
        }
        for name in names
    ]
    return json.dumps({"schemaVersion": 2, "manifests": entries or [entry]}).encode()


def _path(digest: str) -> str:
    return f"blobs/sha256/{digest_hex(digest)}"
