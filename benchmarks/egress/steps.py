"""Real steps of a real BuildKit: behind the firewall, or as stock BuildKit has them."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.daemons import TOOLS
from benchmarks.model import BenchmarkError
from offload_builder.buildkit import (
    BkSession,
    BuildkitDaemon,
    DaemonSettings,
    SessionProviders,
    SolveResult,
    SolveSpec,
)
from offload_builder.egress.firewall.daemonnet import find_cni_plugins, prepare_daemon
from tests.fixtures.buildkit import BASE, dockerfile_source
from tests.fixtures.egressprobe import egress_probe, found_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_builder.egress.firewall.namespaces import NetworkNamespace
    from offload_builder.egress.firewall.projectnet import ProjectNetwork

BUILD_SECONDS = 300.0
PROBE = "COPY --chmod=755 probe /bin/probe\n"


@dataclass(frozen=True)
class Taken:
    """What the probe says of a stream.

    Attributes:
        size_bytes: that came.
        seconds: from the connection on.
        gap_seconds: longest wait between two pieces.
        digest: SHA-256 in hex; of nothing where the stream was not paced.
    """

    size_bytes: int
    seconds: float
    gap_seconds: float
    digest: str


def taken_of(output: str, place: str) -> Taken:
    """Return what the probe printed for a stream.

    Raises:
        BenchmarkError: it did not get it.
    """
    words = found_in(output).get(place, "nothing").split()
    if len(words) != 5 or words[0] != "ok":
        raise BenchmarkError(f"the download of {place} failed: {' '.join(words)}")
    return Taken(int(words[1]), float(words[2]), float(words[3]), words[4])


@asynccontextmanager
async def isolated(root: Path, network: ProjectNetwork) -> AsyncIterator[BuildkitDaemon]:
    """A BuildKit in the network of a project, as a node starts it."""
    place = await asyncio.to_thread(prepare_daemon, root, network)
    settings = DaemonSettings(
        root=root,
        search=[TOOLS],
        command_prefix=place.command_prefix,
        network_mode="cni",
        cni_config_path=place.cni_config,
        cni_binary_dir=place.cni_binaries,
        cni_pool_size=place.pool_size,
    )
    async with _running(settings) as daemon:
        yield daemon


@asynccontextmanager
async def stock(root: Path, machine: NetworkNamespace) -> AsyncIterator[BuildkitDaemon]:
    """A BuildKit on a machine, with the bridge and the masquerading that it comes with."""
    settings = DaemonSettings(
        root=root,
        search=[TOOLS],
        command_prefix=("nsenter", f"--net={machine.path}", "--"),
        network_mode="bridge",
        cni_binary_dir=find_cni_plugins(),
        cni_pool_size=2,
    )
    async with _running(settings) as daemon:
        yield daemon


@asynccontextmanager
async def _running(settings: DaemonSettings) -> AsyncIterator[BuildkitDaemon]:
    async with BuildkitDaemon(settings) as daemon:
        await daemon.ensure_running()
        yield daemon


@asynccontextmanager
async def bare(root: Path) -> AsyncIterator[BuildkitDaemon]:
    """A BuildKit whose steps are on the machine's own network, as with isolation none."""
    async with _running(DaemonSettings(root=root, search=[TOOLS])) as daemon:
        yield daemon


async def step_output(daemon: BuildkitDaemon, command: str) -> str:
    """Run a command of the shell in a step that is not cached; return what it printed.

    Raises:
        BenchmarkError: the build failed.
    """
    return await build_output(daemon, f"{BASE}{PROBE}RUN : {secrets.token_hex(8)}; {command}\n")


async def build_output(daemon: BuildkitDaemon, dockerfile: str) -> str:
    """Build a Dockerfile; return what its steps printed.

    Raises:
        BenchmarkError: the build failed.
    """
    source = dockerfile_source(dockerfile, {"probe": egress_probe()})
    spec = SolveSpec({"filename": "Dockerfile"})
    text = b""
    async with (
        asyncio.timeout(BUILD_SECONDS),
        BkSession(daemon.client, "benchmark", SessionProviders(source=source)) as session,
    ):
        solving = asyncio.create_task(daemon.client.solve(spec, session))
        async for batch in daemon.client.status(spec.ref):
            text += b"".join(log.data for log in batch.logs)
        result = await solving
    if not isinstance(result, SolveResult):
        raise BenchmarkError(f"the build failed: {result}\n{text.decode(errors='replace')}")
    return text.decode(errors="replace")
