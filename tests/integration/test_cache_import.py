"""One import of many builds' records, on real daemons: every step that anyone has built is cached.

Each case is repeated, because what goes wrong in BuildKit with several imports is a race.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from offload_cache.unify import Limits
from tests.fixtures.cachebench import Build, CacheBench, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.fixtures.cachebench import Outcome

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

REPETITIONS = 5
_PARALLEL = 2

RANDOM = "/bin/busybox head -c 16 /dev/urandom > "
APP = f"""\
FROM scratch AS base
COPY busybox /bin/busybox
{run(RANDOM + "/base")}
FROM base AS tool
COPY tool.txt /tool.txt
{run(RANDOM + "/tool-built")}
FROM base AS app
COPY a.txt /a.txt
COPY --from=tool /tool.txt /tool-built /t/
COPY --link link.txt /link.txt
COPY source.txt /source.txt
{run(RANDOM + "/built")}
FROM app AS test
{run(RANDOM + "/tested")}
FROM app
"""
FILES = {"tool.txt": "tool", "a.txt": "a", "link.txt": "link"}
PLATFORMS = """\
FROM scratch AS one
ARG TARGETARCH
COPY a.txt /$TARGETARCH/a.txt
FROM scratch
ARG TARGETARCH
COPY tool.txt /tool.txt
COPY --from=one / /one
COPY source.txt /$TARGETARCH/source.txt
"""


def app(source: str, **changes: object) -> Build:
    return dataclasses.replace(Build(APP, {**FILES, "source.txt": source}), **changes)  # type: ignore[arg-type]


def platforms(source: str, names: str) -> Build:
    files = {**FILES, "source.txt": source}
    return Build(PLATFORMS, files, {"platform": names}, key=names)


ONE, TWO, THREE = app("one"), app("two"), app("three")
TEST = app("one", options={"target": "test"}, key="test")
BOTH = platforms("both", "linux/amd64,linux/arm64")
ARM = platforms("arm", "linux/arm64")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench() -> AsyncIterator[CacheBench]:
    """Builders that knew nothing of each other: their results differ for the same steps."""
    async with CacheBench() as bench:

        async def contribute(builds: Sequence[tuple[str, Build]]) -> None:
            async with bench.daemon() as daemon:
                for scope, build in builds:
                    outcome = await bench.build(daemon, build, write=scope)
                    assert len(outcome.steps) >= 4

        await asyncio.gather(
            contribute([("one", ONE), ("both", BOTH), ("test", TEST)]),
            contribute([("two", TWO), ("min", dataclasses.replace(TWO, mode="min"))]),
            contribute([("three", THREE), ("arm", ARM)]),
        )
        yield bench


async def all_hits(
    bench: CacheBench,
    builds: Sequence[tuple[tuple[str, ...], Build]],
    *,
    before: Build | None = None,
) -> None:
    """Each build, on a fresh daemon for each repetition, finds every step."""
    gate = asyncio.Semaphore(_PARALLEL)

    async def once(number: int) -> list[str]:
        order = list(builds) if number % 2 == 0 else list(builds)[::-1]
        async with gate, bench.daemon() as daemon:
            if before is not None:
                outcome = await bench.build(daemon, before)
                assert not any(outcome.steps.values())
            outcomes: list[Outcome] = [
                await bench.build(daemon, build, read=scopes) for scopes, build in order
            ]
        return [f"{o.hits} without {o.missed}" for o in outcomes if not o.all_cached]

    failures = await asyncio.gather(*(once(number) for number in range(REPETITIONS)))
    assert not any(failures), f"steps were built again: {[f for f in failures if f]}"


MERGED = ("one", "two", "three")
EVERYTHING = (*MERGED, "min", "test", "both", "arm")


@pytest.mark.parametrize(
    "builds",
    [
        pytest.param([(("one", "two"), ONE), (("one", "two"), TWO)], id="conflicting-results"),
        pytest.param([(("two", "one"), TWO), (("two", "one"), ONE)], id="in-the-other-order"),
        pytest.param([(("test", "two"), TEST), (("test", "two"), TWO)], id="mixed-targets"),
        pytest.param([(("both", "arm"), BOTH), (("both", "arm"), ARM)], id="platforms"),
        pytest.param([(("min", "one"), TWO), (("min", "one"), ONE)], id="mode-min-and-max"),
        pytest.param(
            [(("one", "two"), TWO), (("one", "three"), THREE), (("one", "two"), ONE)],
            id="pull-requests-on-one-node",
        ),
        pytest.param(
            [(EVERYTHING, build) for build in (ONE, TWO, THREE, TEST, BOTH, ARM)],
            id="everything-mixed",
        ),
    ],
)
async def test_every_step_that_anyone_built_is_cached(
    bench: CacheBench, builds: list[tuple[tuple[str, ...], Build]]
) -> None:
    await all_hits(bench, builds)


async def test_a_daemon_that_built_its_own_results_finds_those_of_others(
    bench: CacheBench,
) -> None:
    await all_hits(bench, [(MERGED, TWO), (MERGED, THREE)], before=ONE)


async def test_a_users_own_cache_from_beside_ours_does_no_harm(bench: CacheBench) -> None:
    """Two imports that share most records: BuildKit mixes them up unless they differ in salt."""
    async with bench.daemon() as daemon:
        await bench.build(daemon, THREE, read=("one",))
        own = bench.exported(await bench.build(daemon, THREE, write="own"))
    for number in range(REPETITIONS):
        async with bench.daemon() as daemon:
            for build in (THREE, ONE) if number % 2 else (ONE, THREE):
                outcome = await bench.build(daemon, build, read=("one",), imports=(own,))
                assert outcome.all_cached, f"{outcome.hits} without {outcome.missed}"


async def test_the_newest_states_stay_when_months_of_them_do_not_fit() -> None:
    async with CacheBench(Limits(max_records=26)) as bench:
        states = [app(f"state {number}") for number in range(6)]
        async with bench.daemon() as daemon:
            for state in states:
                await bench.build(daemon, state, write="main")
        offer = await (await bench.project()).offers.offer(("main",), "k")
        assert offer is not None
        assert 2 <= len(offer.contributions) < len(states)
        assert offer.records <= 26
        for _ in range(REPETITIONS):
            async with bench.daemon() as daemon:
                newest = await bench.build(daemon, states[-1], read=("main",))
                assert newest.all_cached
                oldest = await bench.build(daemon, states[0], read=("main",))
                assert not oldest.all_cached
                assert len(oldest.missed) == 2  # COPY source.txt and what follows


async def test_a_first_step_of_other_content_is_another_step(bench: CacheBench) -> None:
    """All roots share our salt: it must not make steps equal that only look alike."""
    dockerfile = "FROM scratch\nCOPY a.txt /a.txt\nCOPY link.txt /link.txt\n"
    builds = [Build(dockerfile, {**FILES, "a.txt": f"content {n}"}, key=f"c{n}") for n in range(3)]
    async with bench.daemon() as daemon:
        for build in builds[:2]:
            await bench.build(daemon, build, write="contents")
    for _ in range(REPETITIONS):
        async with bench.daemon() as daemon:
            for number, build in enumerate(builds):
                outcome = await bench.build(daemon, build, read=("contents",))
                assert (outcome.output / "a.txt").read_text() == f"content {number}"
                assert outcome.hits == ("2/2" if number < 2 else "0/2")
