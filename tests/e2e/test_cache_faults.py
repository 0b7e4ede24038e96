"""Two nodes share a bucket behind a proxy that injects faults; an empty node builds from it."""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.faultyproxy import Fault, FaultyProxy
from tests.fixtures.minio import MinioServer
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

MARGIN_SECONDS = 10.0
BLOBS = r"/blobs/"
FAULTS = {
    "silent blobs": (Fault.SILENT, ("GET",), BLOBS),
    "corrupt blobs": (Fault.CORRUPT, ("GET",), BLOBS),
    "blobs that vanished": (Fault.ABSENT, ("GET",), BLOBS),
    "a silent store": (Fault.SILENT, (), ""),
    "a store that is down": (None, (), ""),
}


def steps(name: str) -> str:
    """Return steps whose layers no other test has; the first writes random bytes."""
    tag = name.replace(" ", "-")
    return (
        f"RUN echo {tag} && dd if=/dev/urandom of=/big bs=1M count=2 && sha256sum /big > /sum\n"
        f"RUN cp /sum /sum2 && echo second-{tag}\n"
    )


NEW_STEP = "RUN sha256sum -c /sum && cmp /sum /sum2 && echo all-is-well\n"


def context_of(folder: Path, name: str, more: str = "") -> list[str]:
    """Return the arguments of a build; its place and target tell the cache entries apart."""
    context = make_context(folder, steps(name) + more)
    target = name.replace(" ", "-")
    dockerfile = context / "Dockerfile"
    text = dockerfile.read_text().replace("FROM scratch", f"FROM scratch AS {target}", 1)
    dockerfile.write_text(text)
    return ["--target", target, str(context)]


class Shared:
    """The pool; `busy` occupies the preferred node until the test wants the empty one."""

    def __init__(
        self,
        pool: Pool,
        proxy: FaultyProxy,
        member: Member,
        root: Path,
        empty_node: str,
        rebuild: float,
    ) -> None:
        self.root = root
        self.pool = pool
        self.proxy = proxy
        self.member = member
        self.empty_node = empty_node
        self.rebuild_seconds = rebuild

    @property
    def node_log(self) -> str:
        return (self.pool.data / self.empty_node / "node.log").read_text("utf-8", "replace")

    def wait_used_again(self) -> None:
        """Wait until the node that met the fault says that the store is well again."""
        deadline = time.monotonic() + MARGIN_SECONDS + 2
        while self.node_log.count("cache.store.unreachable") > self.node_log.count(
            "cache.store.recovered"
        ):
            assert time.monotonic() < deadline, self.node_log[-3000:]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """One node has built and published everything, the other one is empty."""
    root = tmp_path_factory.mktemp("shared")
    with (
        MinioServer(tmp_path_factory.mktemp("minio")) as minio,
        FaultyProxy(minio.port) as proxy,
        Pool(
            2, "--s3", f"{proxy.endpoint_url}/bucket", "--slots", "1",
            environment={
                "AWS_ACCESS_KEY_ID": minio.access_key, "AWS_SECRET_ACCESS_KEY": minio.secret_key,
            },
        ) as pool,
    ):  # fmt: skip
        member = pool.member()
        holding = member.start(make_context(root / "busy", "RUN echo holding; sleep 1000\n"))
        try:
            wait_for_text(holding, "sleep 1000")
            for name in (*FAULTS, "never met"):
                began = time.monotonic()
                result = member.build(*context_of(root / name, name))
                rebuild = time.monotonic() - began
                assert result.returncode == 0, result.stderr
                used = member.wait_published()["node_id"]
        finally:
            holding.send_signal(signal.SIGINT)
            holding.communicate(timeout=30)
        empty = {"node-1": "node-2", "node-2": "node-1"}[used]
        again = member.start(make_context(root / "busy", "RUN echo holding; sleep 1001\n"))
        # Whoever gets the next build, the full node is kept busy.
        wait_for_text(again, "sleep 1001")
        where = member.builds()[0]["node_id"]
        if where == empty:
            other = member.start(make_context(root / "busy", "RUN echo holding; sleep 1002\n"))
            wait_for_text(other, "sleep 1002")
            again, other = other, again
            other.send_signal(signal.SIGINT)
            other.communicate(timeout=30)
        try:
            yield Shared(pool, proxy, member, root, empty, rebuild)
        finally:
            again.send_signal(signal.SIGINT)
            again.communicate(timeout=30)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_store_makes_a_build_slower_and_nothing_else(
    shared: Shared, name: str
) -> None:
    fault, verbs, key = FAULTS[name]
    shared.proxy.heal()
    shared.wait_used_again()
    arguments = context_of(shared.root / name, name, NEW_STEP)
    warnings = shared.node_log.count('"level": "warning"')
    rule = None
    if fault is None:
        shared.proxy.go_down()
    else:
        rule = shared.proxy.add(fault, *verbs, key=key)
    began = time.monotonic()
    try:
        result = shared.member.build(*arguments)
        took = time.monotonic() - began
    finally:
        shared.proxy.heal()
        if fault is None:
            shared.proxy.come_up()
    assert result.returncode == 0, result.stderr
    assert re.search(r"^#\d+ \d+\.\d+ all-is-well$", result.stderr, re.MULTILINE), result.stderr
    assert took < shared.rebuild_seconds + MARGIN_SECONDS
    assert rule is None or rule.hits
    assert shared.member.builds()[0]["node_id"] == shared.empty_node
    # One line of the store, and one for each attempt of BuildKit that failed.
    assert shared.node_log.count('"level": "warning"') - warnings <= 4, shared.node_log[-3000:]


def test_a_store_that_is_well_again_is_used_without_a_restart(shared: Shared) -> None:
    shared.proxy.heal()
    shared.wait_used_again()
    arguments = context_of(shared.root / "never met", "never met")
    result = shared.member.build(*arguments)
    assert result.returncode == 0, result.stderr
    stats = shared.member.wait_state("succeeded")["stats"]
    assert stats["steps_cached"] == stats["steps_total"] > 0


def test_an_outage_in_the_middle_of_a_build_is_not_noticed(shared: Shared, tmp_path: Path) -> None:
    shared.proxy.heal()
    building = shared.member.start(
        make_context(tmp_path / "context", "RUN echo begun; sleep 2\nRUN echo made > /made\n")
    )
    wait_for_text(building, "begun")
    shared.proxy.go_down()
    try:
        _, errors = building.communicate(timeout=60)
        assert building.returncode == 0, errors
    finally:
        shared.proxy.come_up()
    # What could not be uploaded meanwhile is uploaded afterwards.
    assert shared.member.wait_published()["cache_state"] == "published"
