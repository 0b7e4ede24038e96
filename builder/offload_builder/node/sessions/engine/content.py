"""What is in the root file system of an engine that is no disk and no device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from offload_builder.node.sessions.engine.rootfs import (
    DATA,
    INIT,
    PROGRAMS,
    init_program,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_builder.node.sessions.contract import SessionNetwork
    from offload_builder.node.sessions.engine.settings import EngineSettings

CONFIG = "/etc/docker/daemon.json"
SOCKET = "/run/docker.sock"
"""Where containers of the engine may have it from; others use the one that it was handed."""
STOP_SECONDS = 8
"""Containers get so long when the engine is stopped, before they are killed."""
_PROGRAM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = (
    "/etc/alternatives", "/etc/ca-certificates", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/pki/ca-trust", "/etc/pki/tls/certs", "/etc/protocols",
    "/etc/services", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
)  # fmt: skip
"""What programs need to be found and to run, and certificates of authorities."""
_TEXTS = (
    ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("/etc/group", "root:x:0:\ntty:x:5:\ndocker:x:999:\nnogroup:x:65534:\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
)


def binds() -> tuple[list[str], list[tuple[str, str]]]:
    """Return what of the machine is seen in an engine, and symbolic links beside it."""
    shown = [name for name in _SETTINGS if Path(name).exists()]
    links: list[tuple[str, str]] = []
    for name in _PROGRAM_FOLDERS:
        path = Path(name)
        if path.is_symlink():
            links.append((name, os.fspath(path.readlink())))
        elif path.is_dir():
            shown.append(name)
    return shown, links


def place_of(program: Path) -> str:
    """Return where an engine has a program of the machine."""
    path = os.path.realpath(program)
    if path.startswith(tuple(f"{folder}/" for folder in _PROGRAM_FOLDERS)):
        return path
    return f"{PROGRAMS}/{program.name}"


def outside_programs(programs: Iterable[Path]) -> list[tuple[str, str]]:
    """Return the programs that an engine would not see otherwise, and where it has them."""
    places = [(os.path.realpath(program), place_of(program)) for program in programs]
    return [(path, place) for path, place in places if path != place]


def texts(hostname: str) -> list[tuple[str, str]]:
    """Return files of an engine that depend on nothing."""
    hosts = f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {hostname}\n"
    return [*_TEXTS, ("/etc/hosts", hosts), ("/etc/hostname", f"{hostname}\n")]


def network_texts(
    settings: EngineSettings, network: SessionNetwork, devices: Sequence[str]
) -> list[tuple[str, str]]:
    """Return files of an engine that depend on its network."""
    config = json.dumps(daemon_config(settings, network, devices), indent=1)
    return [("/etc/resolv.conf", f"nameserver {network.dns}\n"), (CONFIG, config)]


def daemon_config(
    settings: EngineSettings, network: SessionNetwork, devices: Sequence[str]
) -> Mapping[str, object]:
    """Return dockerd's settings. What is not here is as docker has it.

    The userland proxy is off because listeners in the engine's network are found by addresses
    of containers. runc before 1.2 knows no time namespaces.
    """
    options = dict(settings.options)
    features = options.pop("features", {})
    config: dict[str, object] = {
        "hosts": ["fd://", f"unix://{SOCKET}"],
        "data-root": DATA,
        "pidfile": "/run/docker.pid",
        "shutdown-timeout": STOP_SECONDS,
        "userland-proxy": False,
        "mtu": network.mtu,
        "default-network-opts": {
            "bridge": {"com.docker.network.driver.mtu": str(network.mtu)},
        },
        "default-address-pools": [
            {"base": base, "size": size} for base, size in settings.address_pools
        ],
        "cdi-spec-dirs": ["/etc/cdi"],
        "features": {
            "time-namespaces": False,
            "cdi": bool(devices),
            **(features if isinstance(features, dict) else {}),
        },
    }
    if init_program():
        config["init-path"] = INIT
    if network.ipv6:
        config["ipv6"] = True
    return {**config, **options}
