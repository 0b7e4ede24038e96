"""Cache mounts between real BuildKits that share nothing but a store."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from offload_builder.buildkit import SolveFailure
from tests.fixtures.buildkit import BASE
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.mountnode import MountNode, documents, stored_blobs

MOUNT = "--mount=type=cache,target=/cache"
FILL = f"RUN {MOUNT} mkdir /cache/dir && echo first > /cache/dir/file\n"
SEE = f"RUN {MOUNT} test first = $(cat /cache/dir/file)\n"
EMPTY = f'RUN {MOUNT} test -z "$(ls -A /cache)"\n'


@pytest.fixture
def shared():
    folder = Path(tempfile.mkdtemp(prefix="oms-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


async def test_cold_node_sees_what_another_left(shared):
    async with MountNode(shared) as one:
        await one.build(FILL)
        await one.settle()
    async with MountNode(shared) as two:
        await two.build(SEE)
        await asyncio.sleep(0.1)
        assert "restored" in " ".join(two.told)


async def test_owners_modes_links_and_times_survive(shared):
    mount = "--mount=type=cache,id=own,target=/own,uid=5,gid=6,mode=0770"
    make = (
        "echo a > /own/a && chmod 4751 /own/a && chown 7:8 /own/a && ln /own/a /own/hard"
        " && ln -s ../a /own/soft && mkdir -m 1777 /own/d && mkfifo /own/pipe"
        " && touch -d '2001-02-03 04:05:06' /own/d/old && : > /own/empty"
        " && dd if=/dev/zero of=/own/large bs=1M count=20 && mkdir -m 0500 /own/closed"
        " && touch /own/closed/x"
    )
    show = (
        "cd /own && find . -mindepth 1 ! -name listing | sort | while read f; do"
        " stat -c '%n %F %a %u %g %s %Y %h' \"$f\"; done; readlink soft; md5sum large a"
    )
    async with MountNode(shared, settled=True) as one:
        await one.build(f"RUN {mount} {make} && ({show}) > /own/listing\n")
        await one.settle()
    async with MountNode(shared) as two:
        await two.build(f"RUN {mount} ({show}) > /now; diff /own/listing /now\n")
        # Without the owner it is another mount.
        await two.build("RUN --mount=type=cache,id=own,target=/own test ! -e /own/a\n")


@pytest.mark.parametrize("sharing", ["locked", "private", "shared"])
async def test_every_way_of_sharing_moves(shared, sharing):
    mount = f"--mount=type=cache,target=/cache,sharing={sharing}"
    async with MountNode(shared) as one:
        await one.build(FILL.replace(MOUNT, mount))
        await one.settle()
    async with MountNode(shared) as two:
        await two.build(SEE.replace(MOUNT, mount))


async def test_parallel_steps_wait_for_one_restore_and_both_see_it(shared):
    async with MountNode(shared) as one:
        await one.build(FILL)
        await one.settle()
    async with MountNode(shared) as two:
        stages = (
            f"FROM base AS a\n{SEE}RUN echo > /a\n"
            f"FROM base AS b\n{SEE.replace('test', 'true && test')}RUN echo > /b\n"
            "FROM scratch\nCOPY --from=a /a /a\nCOPY --from=b /b /b\n"
        )
        await two.build(stages, base=BASE.replace("scratch", "scratch AS base"))
        await asyncio.sleep(0.1)
        assert len(two.told) == 1


async def test_build_that_is_cached_does_not_ask_for_the_mount(shared):
    async with MountNode(shared, settled=True) as one:
        await one.build(FILL)
        await one.settle()
        before = {path: path.stat().st_atime_ns for path in stored_blobs(shared)}
        await one.build(FILL)
        assert one.told == []
        assert {path: path.stat().st_atime_ns for path in stored_blobs(shared)} == before


async def test_scopes_are_read_in_order_and_no_others(shared):
    async with MountNode(shared) as one:
        await one.build(FILL, write="pr-1")
        await one.settle()
    async with MountNode(shared) as two:
        await two.build(EMPTY, read=("main", "team"))
        # Beside a build that may not read it, a step does not get it either.
        other = asyncio.create_task(two.build("RUN sleep 3\n", read=("main",)))
        await asyncio.sleep(1.0)
        await two.build(f"RUN {MOUNT} true && test ! -e /cache/dir\n", read=("main", "pr-1"))
        await other
    async with MountNode(shared) as three:
        await three.build(SEE, read=("main", "pr-1"))


async def test_build_without_a_write_scope_and_one_that_failed_store_nothing(shared):
    async with MountNode(shared, settled=True) as one:
        await one.build(FILL, write="")
        await one.settle()
        outcome = await one.solve(f"RUN {MOUNT} echo more > /cache/more; false\n")
        assert isinstance(outcome, SolveFailure)
        await one.settle()
    assert documents(shared) == []


async def test_damaged_and_missing_blobs_are_a_miss(shared):
    async with MountNode(shared) as one:
        await one.build(FILL)
        await one.settle()
    (document,) = documents(shared)
    tree = json.loads(document.read_bytes())["tree"].removeprefix("sha256:")
    for blob in stored_blobs(shared):
        if blob.name != tree:
            data = blob.read_bytes()
            blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    async with MountNode(shared) as two:
        await two.build(EMPTY)
    for blob in stored_blobs(shared):
        blob.unlink()
    async with MountNode(shared) as three:
        await three.build(EMPTY)
    document.write_bytes(b"{}")
    async with MountNode(shared) as four:
        await four.build(EMPTY)


async def test_only_new_content_is_uploaded(shared):
    async with MountNode(shared, settled=True) as one:
        await one.build(
            f"RUN {MOUNT} for i in $(seq 1 40); do"
            " dd if=/dev/urandom of=/cache/$i bs=64k count=4 2>/dev/null; done\n"
        )
        await one.settle()
        before = stored_blobs(shared)
        await one.build(f"RUN {MOUNT} echo new > /cache/7more\n")
        await one.settle()
        added = sum(path.stat().st_size for path in stored_blobs(shared) - before)
        assert 0 < added < 10_000
    async with MountNode(shared) as two:
        # What a restore brought counts as stored, too.
        await two.build(
            f"RUN {MOUNT} test 42 = $(ls /cache | wc -l) || echo $(ls /cache | wc -l) > /cache/n\n"
        )
        await two.settle()
        added = sum(path.stat().st_size for path in stored_blobs(shared) - before)
        assert added < 20_000


async def test_mount_above_the_bound_is_not_stored(shared):
    async with MountNode(shared, max_bytes=100_000) as one:
        await one.build(f"RUN {MOUNT} dd if=/dev/zero of=/cache/big bs=1k count=200\n")
        await one.settle()
    assert documents(shared) == []


async def test_mount_is_stored_once_in_an_interval_and_only_when_it_changed(shared):
    async with MountNode(shared, settled=True, interval_seconds=3600) as one:
        await one.build(FILL)
        deadline = time.monotonic() + 30
        while not documents(shared):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        (document,) = documents(shared)
        first = document.read_bytes()
        await one.build(f"RUN {MOUNT} echo other > /cache/other\n")
        await asyncio.sleep(2.5)
        assert document.read_bytes() == first
        await one.settle()
        second = document.read_bytes()
        assert second != first
        await one.build(f"RUN {MOUNT} cat /cache/other\n")
        await one.settle()
        assert document.read_bytes() == second


async def test_node_that_stops_waits_for_what_is_being_stored(shared):
    async with MountNode(shared) as one:
        await one.packing.acquire()
        await one.build(FILL)
        # By now the keeper has taken it up in the background, and waits for its turn.
        await asyncio.sleep(2.5)
        settling = asyncio.create_task(one.settle())
        await asyncio.sleep(0.2)
        one.packing.release()
        await settling
        assert len(documents(shared)) == 1


class SilentStore(DirectoryObjectStore):
    """Gives documents and no blobs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = asyncio.Event()

    async def read(self, key: str, *arguments: object, **options: object) -> int:
        if "/blobs/" not in key:
            return await super().read(key, *arguments, **options)
        self.asked.set()
        await asyncio.sleep(3600)
        raise AssertionError


async def test_step_of_a_build_that_was_given_up_waits_no_longer(shared):
    async with MountNode(shared) as one:
        await one.build(f"RUN {MOUNT} sleep 9; echo x > /cache/x\n")
        await one.settle()
    store = SilentStore(shared)
    async with MountNode(shared, objects=store) as two:
        building = asyncio.create_task(two.build(SEE))
        async with asyncio.timeout(20):
            await store.asked.wait()
        building.cancel()
        await asyncio.wait((building,))
        begun = time.monotonic()
        async with asyncio.timeout(20):
            while any(mount.users for mount in two.mounts._mounts.values()):
                await asyncio.sleep(0.05)
        assert time.monotonic() - begun < 1.5


async def test_what_a_node_that_died_has_left_is_not_seen(shared):
    async with MountNode(shared, settled=True) as one:
        await one.build(f"RUN {MOUNT} mkdir -p /cache/.offload-restore-1/dir\n", write="")
        await one.build(EMPTY, write="")


async def test_mounts_with_the_files_of_a_stage_are_left_alone(shared):
    async with MountNode(shared) as one:
        stages = (
            "RUN mkdir /seed && echo s > /seed/s\nFROM base\n"
            "RUN --mount=type=cache,target=/c,from=base,source=/seed echo > /c/x\n"
            "RUN --mount=type=bind,target=/b,from=base,source=/seed,rw echo > /b/x\n"
        )
        await one.build(stages, base=BASE.replace("scratch", "scratch AS base"))
        await one.settle()
    assert documents(shared) == []


async def test_native_snapshots_move_as_well(shared):
    async with MountNode(shared, snapshotter="native") as one:
        await one.build(FILL)
        await one.settle()
    async with MountNode(shared, snapshotter="native") as two:
        await two.build(SEE)
