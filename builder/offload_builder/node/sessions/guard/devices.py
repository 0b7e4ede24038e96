"""What a container of a session gets for `--gpus` and `--device`: devices of its session by CDI.

`--gpus` is a request for a driver that no engine has here: it becomes a request for the session's
devices by their names, which is what `--device VENDOR/CLASS=NAME` sends as well.

Source: moby's api/types/container.DeviceRequest and daemon/devices for drivers and capabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offload_core.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

_CDI = "cdi"
_GPU = "gpu"
_ALL = "all"
HOW_TO_ASK = "ask for some when the session starts: offload start --gpu"


def rewrite_requests(requests: Sequence[Any], devices: Sequence[str]) -> list[Any]:
    """Return the device requests of a container as the engine understands them.

    Args:
        requests: `HostConfig.DeviceRequests` of the API.
        devices: of the session, fully qualified.

    Raises:
        DeviceUnavailableError: the session has no such device.
    """
    found: list[Any] = []
    for request in requests:
        if not isinstance(request, dict):
            found.append(request)
        elif request.get("Driver") == _CDI:
            names = [str(name) for name in request.get("DeviceIDs") or ()]
            found.append(request | {"DeviceIDs": _named(names, devices)})
        elif _wants_gpu(request):
            found.append({"Driver": _CDI, "DeviceIDs": _gpus(request, devices)})
        else:
            found.append(request)
    return found


def _wants_gpu(request: dict[str, Any]) -> bool:
    return any(_GPU in (some or ()) for some in request.get("Capabilities") or ())


def _named(names: Sequence[str], devices: Sequence[str]) -> list[str]:
    """Return the devices that names mean; `all` of a kind are those that the session has of it."""
    found: dict[str, None] = {}
    for name in names:
        kind, _, which = name.partition("=")
        some = [device for device in devices if device == name]
        if not some and which == _ALL:
            some = [device for device in devices if device.partition("=")[0] == kind]
        if not some:
            raise _missing(f"the device {name}", devices)
        found |= dict.fromkeys(some)
    return list(found)


def _gpus(request: dict[str, Any], devices: Sequence[str]) -> list[str]:
    gpus = [name for name in devices if name.partition("=")[0].rpartition("/")[2] == _GPU]
    # The name for all of a kind is no device beside them.
    single = [name for name in gpus if not name.endswith(f"={_ALL}")] or gpus
    if wanted := [str(name) for name in request.get("DeviceIDs") or ()]:
        return list(dict.fromkeys(_one(name, single, devices) for name in wanted))
    count = int(request.get("Count") or 0)
    if not gpus or count > len(single):
        raise _missing(f"{count} GPUs" if count > 1 else "a GPU", devices)
    return single if count < 0 else single[: count or 1]


def _one(wanted: str, gpus: Sequence[str], devices: Sequence[str]) -> str:
    if wanted in gpus:
        return wanted
    for name in gpus:
        if name.partition("=")[2] == wanted:
            return name
    raise _missing(f"the GPU {wanted}", devices)


def _missing(what: str, devices: Sequence[str]) -> DeviceUnavailableError:
    have = f"it has {', '.join(sorted(devices))}" if devices else "it has no devices"
    return DeviceUnavailableError(f"this session has not got {what}: {have}", hint=HOW_TO_ASK)
