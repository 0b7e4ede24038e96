"""What a container of a session may be made with: `POST /containers/create` of the engine's API."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_builder.node.sessions.contract import MODELS_VOLUME
from offload_builder.node.sessions.engine.rootfs import BINDS
from offload_builder.node.sessions.guard.devices import rewrite_requests
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_BODY = 2 << 20
"""Bytes; JSON of a few of them becomes many times as much memory."""
ENGINE_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")
_MOUNT = ("Type", "Source")
_REQUEST = ("Driver", "DeviceIDs", "Capabilities", "Count")
_HOW_TO_BIND = (
    "use the docker context of the session (offload start makes it), which brings directories"
    " here, or copy files with docker cp"
)


@dataclass(frozen=True, slots=True)
class Creation:
    """A wish for a container.

    Attributes:
        body: for the engine; what came where nothing had to be changed.
        image: as it was named.
        models: it mounts the volume with the project's model files.
    """

    body: bytes
    image: str
    models: bool


def read_creation(body: bytes, devices: Sequence[str]) -> Creation:
    """Check a wish for a container, and have it ask for the session's devices.

    Args:
        body: of the request.
        devices: of the session, fully qualified.

    Raises:
        UsageError: it wants a directory that is not here.
        DeviceUnavailableError: it wants a device that the session has not got.
    """
    try:
        wish = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        # The engine says what is wrong with it.
        return Creation(body, "", models=False)
    if not isinstance(wish, dict):
        return Creation(body, "", models=False)
    wish = _as_engine_reads(wish, ("HostConfig", "Image"))
    if not isinstance(wish.get("HostConfig"), dict):
        return Creation(body, str(wish.get("Image") or ""), models=False)
    host = _as_engine_reads(wish["HostConfig"], ("Binds", "Mounts", "DeviceRequests"))
    wish["HostConfig"] = host
    host |= {
        name: [_as_engine_reads(item, keys) if isinstance(item, dict) else item for item in listed]
        for name, keys in (("Mounts", _MOUNT), ("DeviceRequests", _REQUEST))
        if (listed := _list(host, name))
    }
    for source in _bound(host):
        if not _is_here(source):
            raise UsageError(
                f"a session's engine has no directory {source} of your machine", hint=_HOW_TO_BIND
            )
    models = MODELS_VOLUME in _volumes(host)
    image = str(wish.get("Image") or "")
    requests = host.get("DeviceRequests")
    if not isinstance(requests, list) or not requests:
        return Creation(body, image, models)
    try:
        rewritten = rewrite_requests(requests, devices)
    except (TypeError, ValueError):
        # Not of the types that they should have, which the engine says as well.
        return Creation(body, image, models)
    if rewritten == requests:
        return Creation(body, image, models)
    host["DeviceRequests"] = rewritten
    return Creation(json.dumps(wish).encode(), image, models)


def _as_engine_reads(found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an object with these names as they are: the engine finds them in any case.

    Raises:
        UsageError: one is there twice; nobody could say which one holds.
    """
    known = {name.casefold(): name for name in names}
    return _once([(known.get(key.casefold(), key), value) for key, value in found.items()])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UsageError("the container's settings have one of their names more than once")
    return found


def _bound(host: dict[str, Any]) -> Iterator[str]:
    """Yield the paths of the engine's machine that a container wants to see."""
    for bind in _list(host, "Binds"):
        source = str(bind).partition(":")[0]
        if source.startswith(("/", ".", "~")):
            yield source
    for mount in _list(host, "Mounts"):
        if isinstance(mount, dict) and str(mount.get("Type", "")).lower() == "bind":
            yield str(mount.get("Source", ""))


def _volumes(host: dict[str, Any]) -> set[str]:
    named = {str(bind).partition(":")[0] for bind in _list(host, "Binds")}
    for mount in _list(host, "Mounts"):
        if isinstance(mount, dict) and str(mount.get("Type", "")).lower() == "volume":
            named.add(str(mount.get("Source", "")))
    return named


def _list(host: dict[str, Any], name: str) -> list[Any]:
    found = host.get(name)
    return found if isinstance(found, list) else []


def _is_here(source: str) -> bool:
    path = posixpath.normpath(source)
    return path in ENGINE_SOCKETS or path == BINDS or path.startswith(f"{BINDS}/")
