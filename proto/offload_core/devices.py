"""Devices of builds: what --allow device=NAME asks for, and which devices a name means.

Sources: the Container Device Interface (fully qualified names, VENDOR/CLASS=NAME); BuildKit's
util/entitlements (the list after "device=") and solver/llbsolver/cdidevices (what a name means).
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

DEVICE = "device"
"""BuildKit's name of the entitlement."""
ANY_DEVICE = "*"
"""Stands for whatever devices there are: `--allow device`."""
MAX_NAME = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]*(/[A-Za-z0-9._-]+)?(=([A-Za-z0-9._:-]+|\*))?")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=*+-]*")


@dataclass(frozen=True, slots=True)
class DeviceWish:
    """A device that a build wants to use.

    Attributes:
        name: VENDOR/CLASS=NAME, VENDOR/CLASS or a further name; `ANY_DEVICE` for all.
        alias: what steps call it; empty for the same.
    """

    name: str
    alias: str = ""

    @property
    def entitlement(self) -> str:
        """What BuildKit is told."""
        if self.name == ANY_DEVICE:
            return DEVICE
        return f"{DEVICE}={self.name},alias={self.alias}" if self.alias else f"{DEVICE}={self.name}"


def read_wish(entitlement: str) -> DeviceWish:
    """Read "device" or "device=NAME[,alias=NAME]".

    Raises:
        InvalidValueError: it cannot be understood.
    """
    text = entitlement.partition("=")[2]
    if not text:
        return DeviceWish(ANY_DEVICE)
    try:
        name, *others = next(csv.reader(io.StringIO(text), strict=True), [""])
    except csv.Error as error:
        raise InvalidValueError(f"invalid --allow {entitlement[:100]!a}: {error}") from error
    alias = ""
    for part in others:
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidValueError(f'invalid device config "{part}"')
        if key != "alias":
            raise InvalidValueError(f'unknown device config key "{key}"')
        alias = value
    for word, pattern in ((name, _NAME), *(((alias, _ALIAS),) if alias else ())):
        if len(word) > MAX_NAME or pattern.fullmatch(word) is None:
            raise InvalidValueError(
                f"{word[:100]!a} is no name of a device; use VENDOR/CLASS=NAME, "
                "for example nvidia.com/gpu=all"
            )
    return DeviceWish(name, alias)


def wanted_devices(entitlements: Iterable[str]) -> list[str]:
    """Return the names of the devices that entitlements ask for, each once.

    Raises:
        InvalidValueError: one cannot be understood.
    """
    wishes = (read_wish(text) for text in entitlements if text.partition("=")[0] == DEVICE)
    return list(dict.fromkeys(wish.name for wish in wishes))


def kind_of(name: str) -> str:
    """Return the kind of a device, VENDOR/CLASS."""
    return name.partition("=")[0]


def means(wanted: str, device: str, alias: str = "") -> bool:
    """Return whether a device is one of those that a name means.

    Args:
        wanted: the name.
        device: fully qualified name.
        alias: further name of the device; empty for none.
    """
    kind, _, name = wanted.partition("=")
    if wanted == ANY_DEVICE or (alias and wanted == alias):
        return True
    if name in ("", "*"):
        return "/" in kind and kind_of(device) == kind
    return wanted == device
