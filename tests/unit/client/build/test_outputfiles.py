"""Files appear whole or not at all; destinations that cannot work are refused before a build."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_client.build.options import parse_output
from offload_client.build.outputfiles import (
    check_destinations,
    check_file,
    replace_file,
    write_descriptor,
    write_file,
)
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import ConfigError, InvalidValueError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def pieces(*data: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
    if error is not None:
        raise error


async def test_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    await write_file(tmp_path / "x", pieces(b"a" * 100_000, b"b"))
    assert (tmp_path / "x").read_bytes() == b"a" * 100_000 + b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


async def test_broken_stream_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError):
        await write_file(tmp_path / "x", pieces(b"new", error=RuntimeError("broken")))
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


async def test_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    await write_file(tmp_path / "link", pieces(b"new"))
    replace_file(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "newer"


async def test_devices_and_pipes_are_written_into(tmp_path: Path) -> None:
    await write_file(Path("/dev/null"), pieces(b"x"))
    replace_file(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reading = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").read_bytes))
    await asyncio.sleep(0.05)
    await write_file(tmp_path / "pipe", pieces(b"through"))
    assert await reading == b"through"


async def test_full_disk_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot write /dev/full: No space left"):
        await write_file(Path("/dev/full"), pieces(b"x"))
    with pytest.raises(ConfigError, match="No space left"):
        replace_file(Path("/dev/full"), "x")


def test_places_that_take_no_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(InvalidValueError, match="is a directory"):
        check_file(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        check_file(tmp_path / "no" / "x")
    with pytest.raises(ConfigError, match="cannot write"):
        check_file(tmp_path / "f" / "x")
    check_file(tmp_path / "new")


def test_destinations_are_checked_by_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    master, slave = os.openpty()
    try:
        terminal = Invocation([], tmp_path, {}, 0, text_stream(slave), text_stream(slave))
        for text in ("dir", "new/deep", "type=oci,dest=file", "type=tar,dest=new"):
            check_destinations(terminal, [parse_output(text)])
        for text in ("file", "type=oci,dest=dir", "type=docker,dest=no/x", "-", "type=oci"):
            with pytest.raises(OffloadError) as caught:
                check_destinations(terminal, [parse_output(text)])
            assert caught.value.message
    finally:
        os.close(master)
        os.close(slave)


async def test_pipe_that_nobody_reads_does_not_hold_up_a_cancellation() -> None:
    reader, writer = os.pipe()
    try:
        writing = asyncio.create_task(write_descriptor(writer, pieces(b"x" * (1 << 20))))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert time.monotonic() - began < 1.0
    finally:
        os.close(reader)
        os.close(writer)


async def test_reader_that_went_away_is_a_broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            await write_descriptor(writer, pieces(b"x"))
    finally:
        os.close(writer)
