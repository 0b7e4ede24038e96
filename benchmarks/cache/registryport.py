"""A process with a node's registry and nothing else: `registryport.py FOLDER PORT`.

It prints the capability of one build, which may push and pull, and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from offload_cache.contributions import Writer
from offload_cache.nodestore import NodeStore
from offload_cache.registry import Grant, Registry, RegistryServer


async def serve(folder: Path, port: int) -> None:
    """Serve a project's blobs below `folder` until the process is asked to end."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    registry = Registry()
    async with NodeStore(folder) as node, RegistryServer(registry, node.statistics, port=port):
        project = await node.project("bench")
        grant = Grant(project, ("main",), "main", "default", Writer("build", "somebody", "member"))
        written = folder / "new"
        written.write_text(registry.grant(grant))
        written.rename(folder / "capability")
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
