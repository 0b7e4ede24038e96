"""The documents that BuildKit imports, written from united records.

BuildKit's importer takes neither a manifest nor a configuration above 1 MiB
(`cache/remotecache/import.go`, `readBlob`), and then finds nothing at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from offload_cache.manifests import CACHE_CONFIG_TYPE, OCI_MANIFEST
from offload_cache.unify.records import SALT_PREFIX, time_text
from offload_core.digest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from offload_cache.contributions import CacheLayer
    from offload_cache.unify.records import Record
    from offload_cache.unify.union import Union

_CREATED_AT = "buildkit/createdat"
_SOURCE_PREFIX = "containerd.io/distribution.source"
_SELECTOR_BYTES = 8


@dataclass(frozen=True, slots=True)
class Rendered:
    """A cache import.

    Attributes:
        config: the records, salted.
        config_digest: of `config`.
        layers: descriptors of the manifest as JSON, by digest, in the manifest's order.
        record_count: without the salt.
    """

    config: bytes
    config_digest: str
    layers: Mapping[str, bytes]
    record_count: int

    @property
    def manifest_bytes(self) -> int:
        """Upper bound of the manifest's length."""
        return 400 + sum(len(layer) + 1 for layer in self.layers.values())

    def manifest(self, keep: Collection[str] | None = None) -> bytes:
        """Return the manifest, with only the layers in `keep` listed.

        BuildKit drops every result whose chain has a layer that is not listed and keeps its
        record, so the configuration need not change.
        """
        listed: Iterable[bytes] = self.layers.values()
        if keep is not None:
            listed = [layer for digest, layer in self.layers.items() if digest in keep]
        head = orjson.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {
                    "mediaType": CACHE_CONFIG_TYPE,
                    "digest": self.config_digest,
                    "size": len(self.config),
                },
            }
        )
        return head[:-1] + b',"layers":[' + b",".join(listed) + b"]}"


def salt_digest(project_id: str) -> str:
    """Return the digest of the fake root that a project's imports carry."""
    rest = hashlib.sha256(f"offload cache salt\n{project_id}".encode()).hexdigest()
    return (SALT_PREFIX + rest)[: len("sha256:") + 64]


def render(union: Union, salt: str, *, short: bool = False) -> Rendered:
    """Write united records; equal unions give equal bytes.

    BuildKit tells records apart by identifiers that it derives from their parents, and mixes up
    imports that have equal ones (`solver/cachemanager.go`). A fake root as one more alternative
    of the first input makes ours differ from those of a user's own import. Each link to it has a
    selector of its own: a shared alternative would make different records of one digest equal.

    Args:
        union: the records.
        salt: digest of the fake root.
        short: leave out what is not needed, to save space.
    """
    chain_order = sorted(union.chains, key=lambda name: (union.chains[name][0], name))
    chain_index = {name: index for index, name in enumerate(chain_order)}
    order = sorted(union.records, key=lambda name: (union.records[name].depth, name))
    record_index = {name: index for index, name in enumerate(order, 1)}
    records: list[dict[str, Any]] = [{"digest": salt}]
    records += [
        _record(name, union.records, record_index, chain_index, short=short) for name in order
    ]
    layers = []
    for name in chain_order:
        blob, below = union.chains[name]
        layers.append({"blob": blob, "parent": -1 if below is None else chain_index[below]})
    config = orjson.dumps({"layers": layers, "records": records})
    return Rendered(
        config=config,
        config_digest=sha256_digest(config),
        layers={
            digest: orjson.dumps(_descriptor(union.layers[digest], short=short))
            for digest in sorted(union.layers)
        },
        record_count=len(order),
    )


def _record(
    name: bytes,
    records: Mapping[bytes, Record],
    record_index: Mapping[bytes, int],
    chain_index: Mapping[bytes, int],
    *,
    short: bool,
) -> dict[str, Any]:
    record = records[name]
    found: dict[str, Any] = {"digest": record.digest}
    if record.inputs:
        inputs = []
        for some in record.inputs:
            links = sorted((record_index[parent], selector) for parent, selector in some)
            inputs.append([{"link": i, "selector": s} if s else {"link": i} for i, s in links])
        if any(records[parent].depth == 0 for some in record.inputs for parent, _ in some):
            inputs[0].append({"link": 0, "selector": name[:_SELECTOR_BYTES].hex()})
        found["inputs"] = inputs
    if record.results:
        found["layers"] = [
            {
                "layer": chain_index[result.chain],
                "createdAt": time_text(result.created_at, short=short),
            }
            for result in record.results
        ]
    return found


def _descriptor(layer: CacheLayer, *, short: bool) -> dict[str, Any]:
    annotations = {
        name: value
        for name, value in sorted(layer.annotations.items())
        if not name.startswith(_SOURCE_PREFIX) and not (short and name == _CREATED_AT)
    }
    found: dict[str, Any] = {
        "mediaType": layer.media_type,
        "digest": layer.digest,
        "size": layer.size_bytes,
    }
    if annotations:
        found["annotations"] = annotations
    return found


def empty_import() -> Rendered:
    """Return an import with nothing in it."""
    config = orjson.dumps({"layers": [], "records": []})
    return Rendered(config, sha256_digest(config), {}, 0)
