"""The rules of BuildKit that our one import relies on; a failure names the rule that changed.

They hold for the BuildKit of `deploy/`; run this first when that is replaced.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from offload_cache.contributions import CacheLayer
from offload_cache.unify import read_part, render, salt_digest, unite
from tests.fixtures.cachebench import Build, CacheBench, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_cache.registry.grants import HeldManifest
    from tests.fixtures.cachebench import Outcome

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

REPETITIONS = 5
MIB = 1 << 20
RANDOM = "/bin/busybox head -c 16 /dev/urandom > "
DOCKERFILE = f"""\
FROM scratch
COPY busybox /bin/busybox
{run(RANDOM + "/first")}
COPY tool.txt /tool.txt
COPY source.txt /source.txt
{run(RANDOM + "/second")}
"""
ONE = Build(DOCKERFILE, {"tool.txt": "tool", "source.txt": "one"})
TWO = Build(DOCKERFILE, {"tool.txt": "tool", "source.txt": "two"})


class Exports:
    """Two exported caches that share most records, of builders that knew nothing of each other."""

    def __init__(self, bench: CacheBench, one: HeldManifest, two: HeldManifest) -> None:
        self.bench = bench
        self.manifests = (one, two)

    async def parts(self, number: int) -> tuple[bytes, list[dict[str, object]]]:
        """Return the records and the layers of an export."""
        document = json.loads(self.manifests[number].body)
        store = (await self.bench.project()).store
        config = await store.read_blob(document["config"]["digest"], max_bytes=MIB)
        return config, document["layers"]

    async def salted(self, number: int) -> HeldManifest:
        """Return an export as we would serve it alone, with a salt of its own."""
        config, layers = await self.parts(number)
        described = [
            CacheLayer(str(raw["digest"]), int(str(raw["size"])), str(raw["mediaType"]), {})
            for raw in layers
        ]
        union = unite([read_part(config, described)], lambda _: True)
        return await self.bench.raw(render(union, salt_digest(f"salt {number}")).config, layers)  # type: ignore[arg-type]

    async def build(self, *imports: HeldManifest) -> Outcome:
        """Build the first of the two on a daemon that has nothing."""
        async with self.bench.daemon() as daemon:
            return await self.bench.build(daemon, ONE, imports=imports)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exports() -> AsyncIterator[Exports]:
    async with CacheBench() as bench:
        async with bench.daemon() as daemon:
            one = bench.exported(await bench.build(daemon, ONE, write="one"))
        async with bench.daemon() as daemon:
            two = bench.exported(await bench.build(daemon, TWO, write="two"))
        yield Exports(bench, one, two)


async def test_two_imports_that_share_records_lose_some_of_them(exports: Exports) -> None:
    one, two = exports.manifests
    assert (await exports.build(one)).all_cached
    missed = [not (await exports.build(one, two)).all_cached for _ in range(REPETITIONS)]
    assert any(missed), (
        "the rule changed that BuildKit remembers one importer for records with equal identifiers "
        "and does not find the other's descendants (solver/cachemanager.go): several imports may "
        "unite by themselves now; see docs/adr/0005-one-import.md"
    )


async def test_salt_keeps_two_imports_apart(exports: Exports) -> None:
    _, two = exports.manifests
    salted = (await exports.salted(0), await exports.salted(1))
    for number in range(REPETITIONS):
        # A user's own import has no salt; ours has.
        outcome = await exports.build(salted[0], two if number % 2 else salted[1])
        assert outcome.all_cached, (
            f"{outcome.hits} without {outcome.missed}: the rule changed that a record's "
            "identifier in an import is derived from its parents "
            "(cache/remotecache/v1/chains.go, computeID): a fake root does not tell our "
            "records from a user's own any more"
        )


@pytest.mark.parametrize(("size_bytes", "accepted"), [(MIB - 1000, True), (MIB + 1000, False)])
async def test_documents_above_one_mebibyte_are_not_read(
    exports: Exports, size_bytes: int, accepted: bool
) -> None:
    config, layers = await exports.parts(0)
    filled = config + b" " * (size_bytes - len(config))
    outcome = await exports.build(await exports.bench.raw(filled, layers))  # type: ignore[arg-type]
    assert outcome.all_cached == accepted, (
        f"{outcome.hits} with records of {size_bytes} bytes: the rule changed that BuildKit reads "
        "up to 1 MiB (cache/remotecache/import.go, readBlob); see "
        "offload_cache.unify.Limits.max_document_bytes"
    )
    if not accepted:
        assert not any(outcome.steps.values())


async def test_a_layer_that_is_not_listed_drops_only_results_that_need_it(
    exports: Exports,
) -> None:
    config, layers = await exports.parts(0)
    chain = json.loads(config)["layers"]
    parents = {layer.get("parent", 0) for layer in chain}
    [top] = [layer["blob"] for index, layer in enumerate(chain) if index not in parents]
    listed = [layer for layer in layers if layer["digest"] != top]
    assert len(listed) == len(layers) - 1
    outcome = await exports.build(await exports.bench.raw(config, listed))  # type: ignore[arg-type]
    assert [name for name in outcome.missed if "RUN" in name] == outcome.missed != [], (
        f"{outcome.hits} without {outcome.missed}: the rule changed that an unlisted layer drops "
        "the results that need it, and only those (cache/remotecache/v1/parse.go, getRemoteChain)"
    )
    assert len(outcome.missed) == 1


async def test_records_are_one_when_they_share_an_alternative_of_every_input(
    exports: Exports,
) -> None:
    """Two documents in one: BuildKit unites their records itself while it reads them."""
    documents = [await exports.parts(number) for number in (0, 1)]
    first, second = (json.loads(config) for config, _ in documents)
    layers, records = len(first["layers"]), len(first["records"])
    for layer in second["layers"]:
        if layer.get("parent", 0) != -1:
            layer["parent"] = layer.get("parent", 0) + layers
    for record in second["records"]:
        for result in record.get("layers", []):
            result["layer"] += layers
        for some in record.get("inputs", []):
            for link in some:
                link["link"] += records
    both = {name: first[name] + second[name] for name in ("layers", "records")}
    listed = {str(raw["digest"]): raw for _, descriptors in documents for raw in descriptors}
    for _ in range(REPETITIONS):
        manifest = await exports.bench.raw(json.dumps(both).encode(), list(listed.values()))
        outcome = await exports.build(manifest)
        assert outcome.all_cached, (
            f"{outcome.hits} without {outcome.missed}: the rule changed by which BuildKit's "
            "importer unites records (cache/remotecache/v1/chains.go, CacheChains.Add); see "
            "offload_cache.unify.closure"
        )
