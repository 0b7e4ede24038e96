"""What an engine says of its version."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node.sessions.engine.process import ask_version


@pytest.mark.parametrize(
    ("server", "version"),
    [
        (b"Docker/29.0.1-rc.1+x~1 (linux)", "29.0.1-rc.1+x~1"),
        (b"Docker/29.0.1\x1b[31m (linux)", ""),
        (b"Docker/" + b"9" * 4000 + b" (linux)", ""),
        (b"Docker", ""),
    ],
)
async def test_a_version_is_short_and_plain_or_not_known(tmp_path, server, version):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nServer: " + server + b"\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    path = tmp_path / "engine.sock"
    async with await asyncio.start_unix_server(answer, path):
        assert await ask_version(path) == version
