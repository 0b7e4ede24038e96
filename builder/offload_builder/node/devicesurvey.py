"""Which devices builds can have at a node, by the Container Device Interface.

Specifications are JSON or YAML files in a few directories. A BuildKit of its own is asked what it
makes of them, as it is BuildKit that gives devices to steps; it is asked again when a file there
has changed. What it can read is copied to where the BuildKits of projects look, also while they
run.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import DaemonSettings
from offload_builder.node.devicespecs import (
    copied_folder,
    fingerprint,
    read_specifications,
    write_copies,
)
from offload_builder.provider.process import tools_directory
from offload_core.errors import NodeLostError, OffloadError
from offload_proto.v1.nodes_service_pb2 import NodeDevice, NodeDevices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from offload_builder.buildkit.client import Device
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.devicespecs import Fingerprint, Specification
    from offload_builder.node.entitlements import Permitted
    from offload_builder.node.trustdomain import TrustDomain

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
AGAIN_SECONDS = 30.0
"""After no BuildKit could be asked."""
MAX_DEVICES = 1000
"""Of one node; more are not told to the gateway."""
_LOG_LINES = 200
_TRIES = 20
"""Each leaves one specification out."""


class DeviceSurvey:
    """Finds the devices of a node.

    Attributes:
        found: None until it is known.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._folders = config.cdi_spec_dirs
        self.found: NodeDevices | None = None

    async def run(self, tell: Callable[[], None]) -> None:
        """Find out, and again whenever a specification has changed, until cancelled.

        Args:
            tell: called when there is news.
        """
        seen: Fingerprint | None = None
        while True:
            now = await asyncio.to_thread(fingerprint, self._folders)
            known = True
            if now != seen:
                devices = await self._look()
                known, seen = devices is not None, now
                found = devices_message(devices or ())
                if found != self.found:
                    self.found = found
                    log.info("devices.found", devices=[item.name for item in found.devices])
                    tell()
            if known:
                await asyncio.sleep(LOOK_SECONDS)
            else:
                seen = None
                await asyncio.sleep(AGAIN_SECONDS)

    async def _look(self) -> Sequence[Device] | None:
        """Return the devices that there are now, and let builds have them; None for unknown."""
        devices: Sequence[Device] = ()
        root = self._config.data / "survey-devices"
        try:
            given = await asyncio.to_thread(read_specifications, self._folders)
            if given:
                devices, given = await self._try(given, root)
            await asyncio.to_thread(write_copies, _copies(self._config), len(self._folders), given)
        except (OffloadError, OSError) as error:
            # Where no BuildKit starts, nothing is built anyway.
            log.warning("devices.unknown", cause=str(error))
            return None
        finally:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
        if free := [device.name for device in devices if device.auto_allowed]:
            log.warning("devices.need_no_entitlement", devices=free)
        return devices

    async def _try(
        self, given: list[Specification], root: Path
    ) -> tuple[Sequence[Device], list[Specification]]:
        """Return what BuildKit makes of specifications, and those that it can read."""
        copies = root / "cdi"
        settings = DaemonSettings(
            root=root / "buildkit",
            binary=self._config.buildkitd,
            search=(tools_directory(),),
            cdi_spec_dirs=[copied_folder(copies, n) for n in range(len(self._folders))],
        )
        for _ in range(_TRIES):
            await asyncio.to_thread(write_copies, copies, len(self._folders), given)
            async with BuildkitDaemon(settings) as daemon:
                try:
                    return (await daemon.ensure_running()).devices, given
                except NodeLostError:
                    said = daemon.log_tail(_LOG_LINES)
                    # Of two that contradict each other, the later one.
                    bad = next((item for item in given[::-1] if _names(said, item, copies)), None)
                    if bad is None:
                        raise
            cause = next(line for line in said.splitlines() if _names(line, bad, copies))
            log.warning("devices.specification.broken", path=str(bad.path), cause=cause[:500])
            given = [item for item in given if item is not bad]
        return (), []


def _names(text: str, item: Specification, copies: Path) -> bool:
    return f'"{item.copy_in(copies)}"' in text


def _copies(config: NodeConfig) -> Path:
    return config.data / "devices"


def devices_message(devices: Sequence[Device]) -> NodeDevices:
    """Return devices as the gateway hears them."""
    ordered = sorted(devices, key=lambda device: device.name)[:MAX_DEVICES]
    return NodeDevices(
        devices=[NodeDevice(name=device.name, alias=device.alias) for device in ordered]
    )


def device_folders(
    config: NodeConfig, domain: TrustDomain, permitted: Permitted
) -> tuple[Path, ...]:
    """Return where the BuildKit of a trust domain looks for devices.

    A specification can give a device to every step, without an entitlement
    (org.mobyproject.buildkit.device.autoallow). So where builds may have none, there are none.
    """
    if domain.is_untrusted or not permitted.devices:
        return ()
    return tuple(copied_folder(_copies(config), n) for n in range(len(config.cdi_spec_dirs)))
