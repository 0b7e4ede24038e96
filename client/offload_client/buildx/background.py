"""Renewing the certificates of builders while nobody waits: a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from offload_client.buildx.builders import list_builders, note_due
from offload_client.buildx.renewal import AGAIN_SECONDS, alone, refresh
from offload_client.invocation import Invocation
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMIT_SECONDS = 60.0


def start_refresh(environment: Mapping[str, str]) -> None:
    """Start renewing in the background; failing to is no error."""
    with contextlib.suppress(OSError):
        # It must not keep the terminal or the streams of the command that has noticed.
        subprocess.Popen(
            [sys.executable, "-m", "offload_client.buildx.background"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=dict(environment),
            start_new_session=True,
            close_fds=True,
        )


def main() -> int:
    """Renew what is due; return the exit code."""
    invocation = Invocation.of_process(())
    with alone(invocation) as mine:
        if not mine:
            return 0
        # First, so that a renewal that fails or hangs is not begun by every command.
        note_due(invocation, not_before=time.time() + AGAIN_SECONDS)
        try:
            asyncio.run(_renew(invocation))
        except (OffloadError, TimeoutError):
            return 1
    return 0


async def _renew(invocation: Invocation) -> None:
    from offload_client.connections import Connections

    async with asyncio.timeout(LIMIT_SECONDS), Connections() as connections:
        await refresh(invocation, connections, list_builders(invocation))


if __name__ == "__main__":
    sys.exit(main())
