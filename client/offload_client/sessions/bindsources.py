"""The directories of this machine that a container is created with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_client.sessions.containers import Source
from offload_core.errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from offload_client.sessions.bindmounts import BindMounts

ENGINE_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")
"""Mean the session's own engine, wherever a container is created."""


async def take_sources(host: dict[str, Any], mounts: BindMounts | None) -> list[Source]:
    """Have all directories in the session, and write their paths there into a HostConfig.

    Args:
        host: HostConfig of a container; changed.
        mounts: synchronises them; None where that is not possible.

    Raises:
        OffloadError: one cannot be had there.
    """
    taken: list[Source] = []
    binds = host.get("Binds") or []
    for at, text in enumerate(binds):
        path, separator, rest = str(text).partition(":")
        if not path.startswith("/") or not separator or path in ENGINE_SOCKETS:
            continue
        options = rest.partition(":")[2].split(",")
        if not os.path.lexists(path):
            # As docker does for -v.
            _make(path)
        source = Source(path, "ro" in options)
        binds[at] = f"{await _prepare(source, mounts)}:{rest}"
        taken.append(source)
    for mount in host.get("Mounts") or []:
        path = str(mount.get("Source") or "")
        if mount.get("Type") != "bind" or path in ENGINE_SOCKETS:
            continue
        if not path.startswith("/"):
            raise InvalidValueError(
                f"invalid mount config for type \"bind\": invalid mount path: '{path}' mount path "
                "must be absolute"
            )
        if not os.path.lexists(path):
            if not (mount.get("BindOptions") or {}).get("CreateMountpoint"):
                raise InvalidValueError(
                    f'invalid mount config for type "bind": bind source path does not exist: {path}'
                )
            _make(path)
        source = Source(path, bool(mount.get("ReadOnly")))
        mount["Source"] = await _prepare(source, mounts)
        taken.append(source)
    return taken


async def _prepare(source: Source, mounts: BindMounts | None) -> str:
    if mounts is None:
        raise ConfigError(
            f"directories of this machine cannot be mounted in this session: {source.path}"
        )
    return await mounts.prepare(source.path, read_only=source.read_only)


def _make(path: str) -> None:
    try:
        Path(path).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"error while creating mount source path '{path}': {error.strerror}"
        ) from error
