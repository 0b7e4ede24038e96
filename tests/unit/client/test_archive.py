"""Unpacking the output of a build."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from offload_client.archive import unpack_archive
from offload_core.errors import ConfigError, InternalError, NodeLostError

_MTIME = 1_700_000_000


def archive(*members: tuple[str, dict[str, Any]]) -> bytes:
    """Make a tar; each member is a name and `data`, or `type`, `link`, `mode`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, fields in members:
            member = tarfile.TarInfo(name)
            data = fields.get("data", b"")
            member.type = fields.get("type", tarfile.REGTYPE)
            member.linkname = fields.get("link", "")
            member.mode = fields.get("mode", 0o644)
            member.mtime = _MTIME
            member.uid = member.gid = 4711
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


async def chunks(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def directory(mode: int = 0o755) -> dict[str, Any]:
    return {"type": tarfile.DIRTYPE, "mode": mode}


def symlink(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "link": target, "mode": 0o777}


def hardlink(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "link": target}


async def test_files_arrive_with_content_mode_and_time(tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    data = archive(
        ("./", directory()),
        ("bin/", directory(0o555)),
        ("bin/tool", {"data": big, "mode": 0o751}),
        ("bin/link", symlink("tool")),
        ("bin/same", hardlink("bin/tool")),
        ("deep/er/file", {"data": b"x", "mode": 0o600}),
        ("pipe", {"type": tarfile.FIFOTYPE, "mode": 0o600}),
    )
    out = tmp_path / "new" / "out"
    stats = await unpack_archive(chunks(data), out)
    assert (stats.files, stats.size_bytes) == (5, len(big) + 1)
    tool = out / "bin" / "tool"
    assert tool.read_bytes() == big
    assert stat.S_IMODE(tool.stat().st_mode) == 0o751
    assert tool.stat().st_mtime == _MTIME
    assert tool.stat().st_uid == os.getuid()
    assert (out / "bin" / "link").readlink() == Path("tool")
    assert (out / "bin" / "same").samefile(tool)
    assert stat.S_IMODE((out / "bin").stat().st_mode) == 0o555
    assert (out / "bin").stat().st_mtime == _MTIME
    assert stat.S_ISFIFO((out / "pipe").stat().st_mode)


async def test_setuid_is_dropped_because_the_owner_changes(tmp_path: Path) -> None:
    await unpack_archive(chunks(archive(("su", {"data": b"x", "mode": 0o6755}))), tmp_path)
    assert stat.S_IMODE((tmp_path / "su").stat().st_mode) == 0o755


async def test_existing_files_are_replaced_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old and longer")
    (tmp_path / "mine").write_text("mine")
    outside = tmp_path.parent / "victim"
    outside.write_text("untouched")
    (tmp_path / "b").symlink_to(outside)
    data = archive(("a", {"data": b"new"}), ("b", {"data": b"new"}))
    await unpack_archive(chunks(data), tmp_path)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"
    assert not (tmp_path / "b").is_symlink()
    assert outside.read_text() == "untouched"
    assert (tmp_path / "mine").read_text() == "mine"


async def test_second_unpacking_into_read_only_directories_works(tmp_path: Path) -> None:
    data = archive(("ro/", directory(0o555)), ("ro/x", {"data": b"x"}))
    await unpack_archive(chunks(data), tmp_path)
    await unpack_archive(chunks(data), tmp_path)
    assert stat.S_IMODE((tmp_path / "ro").stat().st_mode) == 0o555


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/../evil", ".."])
async def test_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(InternalError, match="tries to leave"):
        await unpack_archive(chunks(archive((name, {"data": b"x"}))), out)
    assert not (tmp_path / "evil").exists()


async def test_absolute_name_stays_below_the_destination(tmp_path: Path) -> None:
    await unpack_archive(chunks(archive(("/etc/x", {"data": b"x"}))), tmp_path)
    assert (tmp_path / "etc" / "x").read_text() == "x"


async def test_writing_through_its_own_link_is_refused(tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    data = archive(("a", symlink(str(outside))), ("a/evil", {"data": b"x"}))
    with pytest.raises(InternalError, match="symbolic link"):
        await unpack_archive(chunks(data), out)
    assert not list(outside.iterdir())


async def test_link_that_was_there_before_is_replaced_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "a").symlink_to(outside)
    await unpack_archive(chunks(archive(("a/file", {"data": b"x"}))), out)
    assert not list(outside.iterdir())
    assert (out / "a" / "file").read_text() == "x"


@pytest.mark.parametrize("target", ["../secret", "/../secret"])
async def test_hard_link_to_the_outside_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("s")
    with pytest.raises(InternalError, match="tries to leave"):
        await unpack_archive(chunks(archive(("x", hardlink(target)))), tmp_path / "out")


async def test_hard_link_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    data = archive(("d", symlink(str(tmp_path))), ("x", hardlink("d/secret")))
    with pytest.raises(InternalError, match="links through"):
        await unpack_archive(chunks(data), tmp_path / "out")


async def test_device_is_skipped(tmp_path: Path) -> None:
    data = archive(("null", {"type": tarfile.CHRTYPE}), ("x", {"data": b"x"}))
    stats = await unpack_archive(chunks(data), tmp_path)
    assert stats.files == 1
    assert not (tmp_path / "null").exists()


async def test_truncated_stream_is_an_error(tmp_path: Path) -> None:
    data = archive(("x", {"data": os.urandom(50_000)}))
    with pytest.raises(InternalError, match="damaged"):
        await unpack_archive(chunks(data[:20_000]), tmp_path)


async def test_damaged_stream_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="damaged"):
        await unpack_archive(chunks(os.urandom(5000)), tmp_path)


async def test_error_of_the_stream_is_passed_on(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield archive(("x", {"data": bytes(50_000)}))[:20_000]
        raise NodeLostError("the node is gone")

    with pytest.raises(NodeLostError):
        await unpack_archive(broken(), tmp_path)


async def test_file_in_the_place_of_the_destination_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("file")
    with pytest.raises(ConfigError, match=r"out is in the way.*not a directory"):
        await unpack_archive(chunks(archive(("x", {"data": b"x"}))), tmp_path / "out")


async def test_directory_in_the_place_of_a_file_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is a directory, but the build produced a file"):
        await unpack_archive(chunks(archive(("x", {"data": b"x"}))), tmp_path)
    assert (tmp_path / "x" / "mine").exists()


async def test_empty_archive_makes_the_directory(tmp_path: Path) -> None:
    await unpack_archive(chunks(archive()), tmp_path / "out")
    assert (tmp_path / "out").is_dir()
