"""What an engine needs to give its containers devices by the Container Device Interface.

An engine gets only the devices that its session has: a specification of these alone, with the
device nodes and the files that it names. The further device `all` of each kind means all of them.

Sources: the CDI specification (SPEC.md, v0.6 to v1.0). In user namespaces runc binds device nodes
from where the engine has them under the names that containers see
(libcontainer/rootfs_linux.go, createDevices), so nodes are made under both names.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_builder.node.devicespecs import read_specifications
from offload_core.errors import ConfigError, DeviceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FOLDER = "/etc/cdi"
ALL = "all"
_EDITS = "containerEdits"


@dataclass(frozen=True, slots=True)
class EngineDevices:
    """What goes into the root file system of an engine.

    Attributes:
        nodes: path, "c" or "b", major and minor number.
        files: of the machine.
        specifications: path in the engine, and text.
    """

    nodes: tuple[tuple[str, str, int, int], ...] = ()
    files: tuple[str, ...] = ()
    specifications: tuple[tuple[str, str], ...] = ()


def find_devices(folders: Sequence[Path], names: Sequence[str]) -> EngineDevices:
    """Return what an engine needs for some devices; blocks.

    Args:
        folders: with specifications.
        names: of the devices, fully qualified.

    Raises:
        DeviceUnavailableError: the machine does not have one of them.
        ConfigError: specifications cannot be read here.
    """
    if not names:
        return EngineDevices()
    kinds: dict[str, dict[str, Any]] = {}
    for item in read_specifications(folders):
        specification = _parse(item.path, item.data)
        if isinstance(specification, dict) and isinstance(specification.get("kind"), str):
            _add(kinds.setdefault(specification["kind"], {}), specification)
    chosen: dict[str, dict[str, Any]] = {}
    for name in names:
        kind, _, device = name.partition("=")
        found = kinds.get(kind, {}).get(device)
        if found is None:
            raise DeviceUnavailableError(f"this node has no device {name}")
        chosen.setdefault(kind, {})[device] = found
    nodes: dict[str, tuple[str, str, int, int]] = {}
    files: list[str] = []
    specifications = []
    for number, (kind, devices) in enumerate(sorted(chosen.items())):
        for edits in _edits(devices.values()):
            nodes.update((node[0], node) for node in _nodes(edits))
            files += _files(edits)
        text = json.dumps(_specification(kind, devices))
        specifications.append((f"{FOLDER}/{number}.json", text))
    return EngineDevices(tuple(nodes.values()), tuple(dict.fromkeys(files)), tuple(specifications))


def _parse(path: Path, data: bytes) -> Any:
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):
            return json.loads(data)
        return None
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"{path} cannot be read: PyYAML is not installed",
            hint="install offload-build with the extra bake, or have the specification as JSON",
        ) from error
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError):
        return None


def _add(devices: dict[str, Any], specification: dict[str, Any]) -> None:
    """Note the devices of one file, each with what the file says of all of its own."""
    for device in specification.get("devices") or ():
        if isinstance(device, dict) and isinstance(device.get("name"), str):
            devices[device["name"]] = {
                "version": str(specification.get("cdiVersion", "0.6.0")),
                "shared": specification.get(_EDITS) or {},
                "own": device.get(_EDITS) or {},
            }


def _specification(kind: str, devices: dict[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{"name": name, _EDITS: _merged(_edits([device]))} for name, device in devices.items()]
    if ALL not in devices:
        listed.append({"name": ALL, _EDITS: _merged(_edits(devices.values()))})
    version = max((device["version"] for device in devices.values()), key=_number)
    return {"cdiVersion": version, "kind": kind, "devices": listed}


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _edits(devices: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is done to a container that has these devices, in order."""
    found: list[dict[str, Any]] = []
    for device in devices:
        for edits in (device["shared"], device["own"]):
            if edits and edits not in found:
                found.append(edits)
    return found


def _merged(edits: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for one in edits:
        for key, value in one.items():
            if isinstance(value, list):
                known = merged.setdefault(key, [])
                known += [item for item in value if item not in known]
            else:
                merged[key] = value
    return merged


def _nodes(edits: dict[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    for node in edits.get("deviceNodes") or ():
        path = str(node["path"])
        source = str(node.get("hostPath") or path)
        with contextlib.suppress(OSError):
            found = Path(source).stat()
            kind = "b" if stat.S_ISBLK(found.st_mode) else "c"
            if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode):
                numbers = os.major(found.st_rdev), os.minor(found.st_rdev)
                for place in dict.fromkeys((path, source)):
                    if os.path.normpath(place) == place and place.startswith("/dev/"):
                        yield place, kind, *numbers


def _files(edits: dict[str, Any]) -> list[str]:
    wanted = [str(mount["hostPath"]) for mount in edits.get("mounts") or ()]
    wanted += [str(hook["path"]) for hook in edits.get("hooks") or ()]
    return [
        path
        for path in wanted
        if os.path.normpath(path) == path and path.startswith("/") and Path(path).exists()
    ]
