"""What a node can build: natively, and with QEMU.

BuildKit finds out at its start which machines' programs the kernel runs, natively or by way of
binfmt_misc (util/archutil), and lists their platforms with its worker. It brings QEMU of its own
along where programs named buildkit-qemu-ARCH are in its path (solver/llbsolver/ops/exec_binfmt.go).
"""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import DaemonSettings
from offload_builder.node.config import machine_platform
from offload_builder.provider.process import tools_directory
from offload_core.errors import OffloadError
from offload_proto.v1.nodes_service_pb2 import NodePlatforms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from offload_builder.node.config import NodeConfig

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 3.0
"""For a project's BuildKit to be started and to tell; later one is started only to be asked."""
AGAIN_SECONDS = 300.0
"""QEMU may be installed while the node runs; BuildKit looks anew each time that it is asked."""
_POLL_SECONDS = 0.1
_OWN_QEMU = {
    "aarch64": "linux/arm64",
    "arm": "linux/arm/v7",
    "i386": "linux/386",
    "loongarch64": "linux/loong64",
    "mips64": "linux/mips64",
    "mips64el": "linux/mips64le",
    "ppc64le": "linux/ppc64le",
    "riscv64": "linux/riscv64",
    "s390x": "linux/s390x",
    "x86_64": "linux/amd64",
}
"""What BuildKit's own QEMU programs are called, and for which platform they are."""
_SAME_PROCESSOR = {"linux/amd64": ("linux/amd64", "linux/386"), "linux/arm64": ("linux/arm64",)}
"""Platforms, with all their variants, that a processor runs by itself. Many processors for arm64
do not run programs for arm, and what they do not run BuildKit lists only where QEMU helps."""


class PlatformSurvey:
    """Finds out what a node builds.

    Args:
        config: of the node.
        running: asks a BuildKit that runs for its platforms; empty while none does.

    Attributes:
        found: None until it is known.
    """

    def __init__(
        self, config: NodeConfig, running: Callable[[], Awaitable[tuple[str, ...]]]
    ) -> None:
        self._config = config
        self._running = running
        self.found: NodePlatforms | None = None
        if config.platforms:
            # The administrator knows better.
            self.found = NodePlatforms(native=config.platforms, emulated=config.emulated_platforms)

    async def run(self, tell: Callable[[], None]) -> None:
        """Find out, and look again now and then, until cancelled.

        Args:
            tell: called when there is news.
        """
        if self._config.platforms:
            return
        listed = await self._first()
        while True:
            further = self._config.emulated_platforms
            found = sort_platforms(machine_platform(), listed, further, own_qemu())
            if found != self.found:
                self.found = found
                log.info(
                    "platforms.found", native=list(found.native), emulated=list(found.emulated)
                )
                tell()
            await asyncio.sleep(AGAIN_SECONDS)
            listed = await self._running() or listed

    async def _first(self) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_SECONDS
        while loop.time() < until:
            if listed := await self._running():
                return listed
            await asyncio.sleep(_POLL_SECONDS)
        return await self._ask()

    async def _ask(self) -> tuple[str, ...]:
        """Start a BuildKit to ask it; where none starts, nothing is built anyway."""
        root = self._config.data / "survey"
        try:
            settings = DaemonSettings(
                root=root, binary=self._config.buildkitd, search=(tools_directory(),)
            )
            async with BuildkitDaemon(settings) as daemon:
                return (await daemon.ensure_running()).platforms
        except (OffloadError, OSError) as error:
            log.warning("platforms.unknown", cause=str(error))
            return ()
        finally:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)


def sort_platforms(
    machine: str, listed: Iterable[str], further: Iterable[str], qemu: Iterable[str]
) -> NodePlatforms:
    """Return what is native and what is emulated.

    Args:
        machine: platform of the machine.
        listed: by BuildKit's worker.
        further: that the administrator wants to be accepted.
        qemu: for which BuildKit has a QEMU of its own.
    """
    kinds = _SAME_PROCESSOR.get(machine, (machine,))
    native = {machine: None}
    emulated: dict[str, None] = {}
    for item in listed:
        own = any(item == kind or item.startswith(f"{kind}/") for kind in kinds)
        (native if own else emulated)[item] = None
    emulated |= dict.fromkeys((*further, *qemu))
    return NodePlatforms(native=native, emulated=[item for item in emulated if item not in native])


def own_qemu(names: Mapping[str, str] = _OWN_QEMU) -> list[str]:
    """Return the platforms for which BuildKit has a QEMU of its own in its path."""
    return [item for name, item in names.items() if shutil.which(f"buildkit-qemu-{name}")]
