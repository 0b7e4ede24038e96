"""What builds of stock buildx add to the cache of the pool, and when."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.buildx import Buildx, finished, until_output
from tests.fixtures.node import NodePool, wait_free

EXPORT = "exporting cache"
STEPS = "COPY data /data\nRUN busybox cat /data > /copy && echo the step ran\n"
RAN = re.compile(r"^#\d+ [\d.]+ the step ran$", re.MULTILINE)
"""Layers that come late are shown instead of `CACHED`; what a step prints is shown if it runs."""


async def settled(pool, count):
    """Return the builds once their caches are where they go; here that is the node."""
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    async with asyncio.timeout(30):
        while True:
            request = builds_pb.ListRequest()
            builds = list((await stub.List(request, metadata=call_metadata(), timeout=20)).builds)
            done = [b for b in builds if b.cache_state > builds_pb.CACHE_STATE_PENDING]
            if len(done) >= count:
                return builds
            await asyncio.sleep(0.05)


async def known_build(user):
    """Build twice, so that the pool has everything of it."""
    user.dockerfile(STEPS)
    (user.context / "data").write_text("one")
    first = await user.build()
    assert first.code == 0, first.output
    assert EXPORT in first.output
    again = await user.build()
    assert again.code == 0, again.output
    return again


async def test_what_is_known_is_exported_once():
    async with NodePool() as pool:
        await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            again = await known_build(user)
            assert EXPORT not in again.output
            for build in await settled(pool, 2):
                assert build.cache_state == builds_pb.CACHE_STATE_UNCHANGED


@pytest.mark.parametrize("flags", [(), ("--platform", "linux/amd64"), ("-o", "type=oci,dest=i")])
async def test_what_is_new_later_is_found_without_the_daemons_own_cache(flags):
    async with NodePool() as pool:
        await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            await known_build(user)
            (user.context / "data").write_text("two")
            changed = await user.build(*flags)
            assert changed.code == 0, changed.output
            assert EXPORT in changed.output
            assert RAN.search(changed.output)
            for build in await settled(pool, 3):
                assert build.cache_state != builds_pb.CACHE_STATE_FAILED
            known = await user.build(*flags)
            assert EXPORT not in known.output
            await user.ok("prune", "--all", "--force")
            elsewhere = await user.build("-o", "type=oci,dest=image.tar")
            assert elsewhere.code == 0, elsewhere.output
            assert "importing cache" in elsewhere.output
            assert not RAN.search(elsewhere.output), elsewhere.output


async def test_a_copy_alone_is_found_by_its_content():
    async with NodePool() as pool:
        await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            await known_build(user)
            for text in ("two", "three", "four"):
                user.dockerfile("COPY data /data\n")
                (user.context / "data").write_text(text)
                assert (await user.build()).code == 0
                await settled(pool, 3)
                await user.ok("prune", "--all", "--force")
                elsewhere = await user.build()
                assert elsewhere.output.count("CACHED") >= 3, elsewhere.output
                assert (await user.build()).code == 0


async def test_a_step_that_fails_in_a_known_build_is_shown():
    async with NodePool() as pool:
        agent = await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            await known_build(user)
            user.dockerfile("COPY data /data\nRUN exit 7\n")
            failed = await user.build()
            assert failed.code != 0
            assert "exit code: 7" in failed.output
            assert failed.seconds < 10
            await wait_free(agent)


async def test_a_step_of_a_known_build_ends_with_its_client():
    async with NodePool() as pool:
        agent = await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            await known_build(user)
            user.dockerfile("COPY data /data\nRUN sleep 98765\n")
            build = await user.start("build", "--progress", "plain", ".")
            await until_output(build, "RUN sleep 98765")
            await asyncio.sleep(0.5)
            assert sleeping()
            build.kill()
            await finished(build, 10)
            await wait_free(agent)
            async with asyncio.timeout(10):
                while sleeping():
                    await asyncio.sleep(0.1)


def sleeping():
    """Return whether the step runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().split(b"\0")[:2] == [b"sleep", b"98765"]:
                return True
        except OSError:
            continue
    return False
