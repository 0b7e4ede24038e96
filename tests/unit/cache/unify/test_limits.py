from __future__ import annotations

import time

import pytest

from offload_cache.contributions import CacheLayer
from offload_cache.unify import Limits, Part, Unified, read_part, salt_digest, unify
from offload_core.digest import sha256_digest
from tests.fixtures.cachecontent import LAYER_TYPE, step_config
from tests.fixtures.cacheimporter import Importer

SALT = salt_digest("p")


def build(state: int, steps: int, shared: int) -> Part:
    """A build of `steps`, of which the first `shared` are those of every state."""
    names = [f"{number}" if number < shared else f"{state}-{number}" for number in range(steps)]
    blobs = [f"layer {name}".encode() for name in names]
    created = f"{2020 + state // 300}-{1 + state // 28 % 12:02}-{1 + state % 28:02}"
    layers = [
        CacheLayer(
            sha256_digest(blob),
            1000,
            LAYER_TYPE,
            {
                "buildkit/createdat": "2026-01-01T00:00:00.123456789Z",
                "containerd.io/uncompressed": sha256_digest(blob + b"!"),
            },
        )
        for blob in blobs
    ]
    return read_part(step_config(*names, layers=blobs, created=created), layers)


def made(parts: list[tuple[str, Part]], **limits: int) -> Unified[str]:
    return unify(parts, salt=SALT, available=lambda _: True, limits=Limits(**limits))


def test_months_of_states_stay_within_the_bounds_and_the_preferred_stay() -> None:
    parts = [(f"s{state}", build(state, steps=20, shared=10)) for state in range(200, 0, -1)]
    unified = made(parts)
    assert 900 <= unified.rendered.record_count <= 1000
    assert unified.used == tuple(name for name, _ in parts[: len(unified.used)])
    assert len(unified.rendered.config) < 1_000_000
    assert unified.rendered.manifest_bytes < 1_000_000
    assert made(parts).rendered == unified.rendered


def test_small_contributions_are_taken_after_one_that_does_not_fit() -> None:
    parts = [("a", build(1, 30, 0)), ("b", build(2, 90, 0)), ("c", build(3, 30, 0))]
    assert made(parts, max_records=70).used == ("a", "c")


def test_a_contribution_that_is_too_large_alone_loses_its_oldest_leaves() -> None:
    part = build(1, 50, 0)
    unified = made([("a", part)], max_records=20)
    assert unified.rendered.record_count == 20
    assert len(unified.rendered.layers) == 19
    Importer(unified.rendered.config)


@pytest.mark.parametrize("steps", [3_200, 3_900])
def test_documents_are_shortened_and_then_cut_to_what_buildkit_takes(steps: int) -> None:
    unified = made([("a", build(1, steps, 0))], max_records=10_000)
    assert max(len(unified.rendered.config), len(unified.rendered.manifest())) <= 1_000_000
    assert unified.rendered.manifest_bytes >= len(unified.rendered.manifest())
    assert b"buildkit/createdat" not in unified.rendered.manifest()
    assert unified.rendered.record_count > 2_500


def test_nothing_makes_an_empty_import() -> None:
    unified = made([])
    assert (unified.used, unified.rendered.record_count, unified.rendered.layers) == ((), 0, {})


def test_a_thousand_records_of_many_builds_take_well_below_a_second() -> None:
    parts = [(f"s{state}", build(state, steps=20, shared=10)) for state in range(90)]
    started = time.thread_time()
    assert made(parts).rendered.record_count > 800
    assert time.thread_time() - started < 0.5
