"""Trust domains of a project on a node: apart from each other, bounded, removed when idle."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from offload_builder.egress.policy.ofbuild import BuildPolicy, read_build_policy
from offload_builder.node.config import NodeConfig
from offload_builder.node.place import Place
from offload_builder.node.projectpool import MAX_RESTING, ProjectPool
from offload_builder.node.registries import Bases
from offload_builder.node.trustdomain import TrustDomain, set_aside
from offload_cache.nodestore import NodeStore
from offload_core.errors import UsageError
from offload_proto.v1.builds_service_pb2 import NetworkPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_cache.mirror.judging import Judge
    from offload_cache.tiered import ProjectStore


def brought(number: int) -> BuildPolicy:
    return read_build_policy(NetworkPolicy(file=f"{number}.toml"))


EVE, MALLORY = "untrusted-eve", "untrusted-mallory"


def configuration(folder: Path, **options) -> NodeConfig:
    return NodeConfig(gateway="127.0.0.1:1", data=folder, **options)


@asynccontextmanager
async def no_bases(
    _address: str,
    _store: ProjectStore,
    *,
    trusted: bool,
    elsewhere: object,
    judge: Judge | None,
) -> AsyncIterator[Bases]:
    del trusted, elsewhere, judge
    yield Bases({}, None)


@asynccontextmanager
async def on_machine(_: TrustDomain) -> AsyncIterator[Place]:
    yield Place("127.0.0.1:1")


@asynccontextmanager
async def projects(config: NodeConfig) -> AsyncIterator[ProjectPool]:
    async with (
        NodeStore(config.data / "cache") as store,
        ProjectPool(config, store, no_bases, on_machine) as pool,
    ):
        yield pool


def names(data: Path) -> set[str]:
    return {folder.name for folder in (data / "projects").iterdir()}


async def test_each_domain_has_a_buildkit_of_its_own(tmp_path):
    async with projects(configuration(tmp_path)) as pool:
        opened = [await pool.runtime("web", name) for name in ("", "protected", EVE, MALLORY)]
        assert len({runtime._daemon.settings.root for runtime in opened}) == 4
        assert len({runtime._daemon.socket_path for runtime in opened}) == 4
        assert len({runtime._times_path for runtime in opened}) == 4
        assert await pool.runtime("web", EVE) is opened[2]
        # Layers are found by digest and verified: one store for all.
        assert len({id(runtime.cache) for runtime in opened}) == 1


async def test_untrusted_member_has_nothing_by_knowing_its_digest(tmp_path):
    async with projects(configuration(tmp_path)) as pool:
        members = await pool.runtime("web")
        protected = await pool.runtime("web", "protected")
        eve, mallory = await pool.runtime("web", EVE), await pool.runtime("web", MALLORY)
        assert protected.context_store is members.context_store
        stores = {id(members.context_store), id(eve.context_store), id(mallory.context_store)}
        assert len(stores) == 3
        assert eve.arrivals is not members.arrivals
        assert eve.shared_context is None


async def test_untrusted_domains_have_smaller_bounds(tmp_path):
    config = configuration(tmp_path, untrusted_keep=1000, buildkit_idle=400.0)
    domain = TrustDomain("web", EVE)
    assert (domain.buildkit_keep(config), domain.context_keep(config)) == (1000, 1000)
    assert domain.buildkit_idle(config) == 100.0
    for name in ("", "protected"):
        other = TrustDomain("web", name)
        assert other.buildkit_keep(config) == config.buildkit_keep
        assert other.buildkit_idle(config) == 400.0
    small = configuration(tmp_path, buildkit_keep=10, context_keep=20)
    assert (domain.buildkit_keep(small), domain.context_keep(small)) == (10, 20)


async def test_idle_untrusted_domain_is_removed_with_all_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.projectpool.REAP_SECONDS", 0.02)
    config = configuration(tmp_path, untrusted_idle=0.1)
    async with projects(config) as pool:
        reaping = asyncio.ensure_future(pool.reap())
        try:
            await pool.runtime("web")
            eve = await pool.runtime("web", EVE)
            eve._users += 1
            folder = TrustDomain("web", EVE).folder(config)
            await asyncio.sleep(0.3)
            assert folder.exists()
            eve._users -= 1
            eve.touch()
            deadline = time.monotonic() + 10
            while names(tmp_path) != {"web"}:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            again = await pool.runtime("web", EVE)
            assert again is not eve
            assert await again.context_store.run(again.context_store.missing_sync, [b"x" * 32])
        finally:
            reaping.cancel()
            await asyncio.wait((reaping,))


async def test_removing_a_domain_holds_no_other_project_up(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.projectpool.REAP_SECONDS", 0.02)
    removing, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(folder):
        removing.set()
        await go_on.wait()
        return await set_aside(folder)

    monkeypatch.setattr("offload_builder.node.projectpool.set_aside", slowly)
    async with projects(configuration(tmp_path, untrusted_idle=0.1)) as pool:
        await pool.runtime("web", EVE)
        reaping = asyncio.ensure_future(pool.reap())
        try:
            async with asyncio.timeout(10):
                await removing.wait()
                await pool.runtime("shop", MALLORY)
            # The same domain is opened again when nothing of the former one is left.
            again = asyncio.ensure_future(pool.runtime("web", EVE))
            await asyncio.sleep(0.1)
            assert not again.done()
            go_on.set()
            async with asyncio.timeout(10):
                await again
        finally:
            go_on.set()
            reaping.cancel()
            await asyncio.wait((reaping,))


async def test_data_of_untrusted_members_does_not_outlive_a_restart(tmp_path):
    config = configuration(tmp_path)
    async with projects(config) as pool:
        for name in ("", "protected", EVE, MALLORY):
            await pool.runtime("web", name)
    (tmp_path / "projects/~removed-1").mkdir()
    async with projects(config) as pool:
        await pool.runtime("web", MALLORY)
        reaping = asyncio.ensure_future(pool.reap())
        deadline = time.monotonic() + 10
        left = {"web", "web~protected", f"web~{MALLORY}"}
        while names(tmp_path) != left:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        reaping.cancel()
        await asyncio.wait((reaping,))


async def test_build_is_expected_in_the_domain_of_the_last_one(tmp_path):
    async with projects(configuration(tmp_path)) as pool:
        assert (await pool.likely_runtime("web")).domain.name == ""
        await pool.runtime("web", "protected")
        assert (await pool.likely_runtime("web")).domain.name == "protected"
        assert (await pool.likely_runtime("shop")).domain.name == ""


@pytest.mark.parametrize(
    "name",
    ["x", "Protected", "untrusted-", "untrusted-../x", "untrusted-a/b", "untrusted-" + "x" * 65,
     "untrusted-\u0430", "untrusted-a\n", "..", "protected/../.."],
)  # fmt: skip
async def test_domain_that_no_gateway_names_is_refused(tmp_path, name):
    async with projects(configuration(tmp_path)) as pool:
        with pytest.raises(UsageError):
            await pool.runtime("web", name)
        assert not (tmp_path / "projects").exists()


async def test_builds_with_a_policy_share_a_buildkit_with_those_of_the_same_one_only(tmp_path):
    config = configuration(tmp_path, untrusted_keep=1000, buildkit_idle=400.0)
    async with projects(config) as pool:
        plain, eve = await pool.runtime("web"), await pool.runtime("web", EVE)
        first = await pool.runtime("web", "", brought(1))
        others = [
            await pool.runtime("web", "protected", brought(1)),
            await pool.runtime("web", EVE, brought(1)),
            await pool.runtime("web", "", brought(2)),
        ]
        assert await pool.runtime("web", "", brought(1)) is first
        everything = [plain, eve, first, *others]
        assert len({item._daemon.settings.root for item in everything}) == 6
        # Files of a context are found by digest, among those who trust each other.
        assert first.context_store is plain.context_store
        assert others[1].context_store not in (plain.context_store, eve.context_store)
        assert first.domain.buildkit_keep(config) == 1000
        assert first.domain.buildkit_idle(config) == 100.0
        assert (await pool.likely_runtime("web")) is eve


async def test_a_name_of_a_domain_never_leads_to_one_with_a_policy(tmp_path):
    key = brought(1).key
    for name in (f"net-{key}", f"protected~net-{key}", f"untrusted-eve~net-{key}", "~"):
        with pytest.raises(UsageError, match="no trust domain"):
            TrustDomain("web", name)
    config = configuration(tmp_path)
    member = TrustDomain("web", f"untrusted-net-{key}").folder(config)
    assert member != TrustDomain("web", "", brought(1)).folder(config)


async def test_idle_domains_with_policies_are_few_and_go_with_their_data(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.projectpool._LEAST_REST_SECONDS", 0.05)
    async with projects(configuration(tmp_path)) as pool:
        busy = await pool.runtime("web", "", brought(0))
        busy._users += 1
        for number in range(1, 12):
            await pool.runtime(f"p{number % 3}", "", brought(number))
        left = [item for item in pool.running() if item.domain.narrowed]
        assert len(left) == MAX_RESTING + 1
        assert busy in left
        assert len([name for name in names(tmp_path) if "~net-" in name]) == MAX_RESTING + 1
        busy._users -= 1


async def test_what_builds_with_policies_left_does_not_outlive_a_restart(tmp_path):
    config = configuration(tmp_path)
    async with projects(config) as pool:
        for name in ("", EVE):
            await pool.runtime("web", name, brought(1))
    async with projects(config) as pool:
        reaping = asyncio.ensure_future(pool.reap())
        async with asyncio.timeout(10):
            while names(tmp_path) != {"web"}:
                await asyncio.sleep(0.02)
        reaping.cancel()
        await asyncio.wait((reaping,))
