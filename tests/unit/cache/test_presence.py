from __future__ import annotations

from typing import TYPE_CHECKING

from offload_cache.database import CacheDatabase
from offload_cache.presence import BlobState, Presence

if TYPE_CHECKING:
    from pathlib import Path

HOUR = 3600.0


async def rows(database: CacheDatabase) -> list[str]:
    found = await database.run(
        lambda connection: connection.execute("SELECT digest FROM presence").fetchall()
    )
    return sorted(row[0] for row in found)


async def test_blobs_that_are_trusted_again_and_again_never_fade(tmp_path: Path) -> None:
    now = 1e9
    async with CacheDatabase(tmp_path / "index.db") as database:
        presence = Presence(database, "p", clock=lambda: now)
        await presence.trust([("a", 1), ("b", 1)], since=5.0)
        await presence.note("b", BlobState.LOST)
        for _ in range(4):
            now += 4 * HOUR
            assert presence.is_present("a")
            await presence.trust([("a", 1)], since=5.0)
        await presence.note("b", BlobState.LOST)
        now += HOUR / 2
        await presence.trust([("b", 1)], since=5.0)
        assert not presence.is_present("b")


async def test_what_has_faded_is_forgotten_while_the_node_runs(tmp_path: Path) -> None:
    now = 1e9
    async with CacheDatabase(tmp_path / "index.db") as database:
        presence = Presence(database, "p", clock=lambda: now)
        await presence.note("a", BlobState.PRESENT, 1)
        now += 5 * HOUR
        await presence.note("b", BlobState.PRESENT, 1)
        assert await rows(database) == ["a", "b"]
        now += 2 * HOUR
        await presence.note("c", BlobState.PRESENT, 1)
        assert await rows(database) == ["b", "c"]
