"""Settings of a buildkitd, and its configuration file."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BINARY_VARIABLE = "OFFLOAD_BUILDKITD"


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """How the daemon reaches one registry.

    Attributes:
        http: speak plain HTTP.
        insecure: accept any certificate.
        mirrors: hosts that are asked before the registry.
        ca_files: certificates of its authorities.
    """

    http: bool = False
    insecure: bool = False
    mirrors: Sequence[str] = ()
    ca_files: Sequence[Path] = ()


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """One buildkitd. Only its OCI worker is used.

    Attributes:
        root: its directory; everything it keeps, its configuration and its log lie there.
        binary: the program; found by `find_buildkitd` when None.
        search: further directories to look for the program in.
        runc: the container runtime; found in PATH when None.
        gate: shell commands that run before each step; see `write_runc_wrapper`.
        command_prefix: a command that starts the daemon in another place, such as `nsenter ... --`.
        registries: by host and port, for example "localhost:5000".
        entitlements: rights that builds may ask for, such as "network.host".
        cdi_spec_dirs: directories with specifications of devices; empty for no devices at all.
        gc_reserved_bytes: cache that is always kept; None for BuildKit's own rule.
        gc_max_used_bytes: cache above this is deleted; None for BuildKit's own rule.
        gc_min_free_bytes: cache is deleted until so much of the disk is free.
        history_max_entries: builds that the daemon remembers.
        history_max_age_seconds: and for how long.
        max_parallelism: steps that run at the same time; 0 for no limit.
        apparmor_profile: of steps; empty for none.
        snapshotter: "auto", "overlayfs", "native", ...
        network_mode: of steps: "auto", "host", "cni", "bridge" or "none".
        cni_config_path: configuration for "cni".
        cni_binary_dir: programs for "cni".
        cni_pool_size: networks of steps that are made ahead for "cni".
        nameservers: name servers of steps; empty for the machine's.
        step_log_max_bytes: output of one step that is passed on; 0 for all of it.
        environment: variables on top of ours, such as HTTP_PROXY.
        withheld: variables of ours that the daemon must not know.
        log_level: "info", "debug" or "trace".
    """

    root: Path
    binary: Path | None = None
    search: Sequence[Path] = ()
    runc: Path | None = None
    gate: str = ""
    command_prefix: Sequence[str] = ()
    registries: Mapping[str, RegistrySettings] = field(default_factory=dict)
    entitlements: Sequence[str] = ()
    cdi_spec_dirs: Sequence[Path] = ()
    gc_reserved_bytes: int | None = None
    gc_max_used_bytes: int | None = None
    gc_min_free_bytes: int | None = None
    history_max_entries: int = 50
    history_max_age_seconds: int = 48 * 3600
    max_parallelism: int = 0
    apparmor_profile: str = ""
    snapshotter: str = "auto"
    network_mode: str = "auto"
    cni_config_path: Path | None = None
    cni_binary_dir: Path | None = None
    cni_pool_size: int = 0
    nameservers: Sequence[str] = ()
    step_log_max_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    withheld: frozenset[str] = frozenset()
    log_level: str = "info"


def find_buildkitd(configured: Path | None, search: Iterable[Path] = ()) -> Path:
    """Return the buildkitd to run: configured, $OFFLOAD_BUILDKITD, PATH, then `search`.

    Raises:
        ConfigError: there is none, or the named one cannot be run.
    """
    for path, origin in (
        (configured, "the configuration"),
        (Path(text) if (text := os.environ.get(BINARY_VARIABLE)) else None, BINARY_VARIABLE),
    ):
        if path is not None:
            if os.access(path, os.X_OK) and path.is_file():
                return path
            raise ConfigError(f"{origin} names {path} as buildkitd, but it is not a program")
    if (found := shutil.which("buildkitd")) is not None:
        return Path(found)
    for folder in search:
        path = folder / "buildkitd"
        if os.access(path, os.X_OK):
            return path
    raise ConfigError(
        "buildkitd was not found",
        hint="install BuildKit so that buildkitd is in PATH, name the program in the node's"
        f" configuration or in {BINARY_VARIABLE}, or run the node with the docker provider,"
        " which uses the moby/buildkit image",
    )


def find_runc(configured: Path | None) -> Path:
    """Return the container runtime to use.

    Raises:
        ConfigError: there is none.
    """
    if configured is not None:
        if os.access(configured, os.X_OK):
            return configured
        raise ConfigError(f"the configuration names {configured} as runc, but it is no program")
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    for name in ("buildkit-runc", "runc"):
        if (found := shutil.which(name, path=path)) is not None:
            return Path(found)
    raise ConfigError("runc was not found", hint="install the package runc")


def log_environment(settings: DaemonSettings) -> dict[str, str]:
    """Return the variables that bound the output of a step.

    Without them BuildKit drops what exceeds 2 MiB in all or 200 KiB per second
    (util/progress/logs).
    """
    return {
        "BUILDKIT_STEP_LOG_MAX_SIZE": str(settings.step_log_max_bytes or -1),
        "BUILDKIT_STEP_LOG_MAX_SPEED": "-1",
    }


def daemon_toml(settings: DaemonSettings, socket: Path, runc: Path) -> str:
    """Return the daemon's configuration file."""
    lines = [f"root = {_toml(str(settings.root))}"]
    if settings.entitlements:
        lines.append(f"insecure-entitlements = {_toml(list(settings.entitlements))}")
    lines += ["[log]", f"level = {_toml(settings.log_level)}", 'format = "text"']
    lines += ["[grpc]", f"address = {_toml([f'unix://{socket}'])}"]
    # The default is one path for all daemons of the machine.
    lines += ["[otel]", f"socketPath = {_toml(str(socket.with_name('otel.sock')))}"]
    lines += _worker_lines(settings, runc)
    lines += ["[worker.containerd]", "enabled = false"]
    if settings.cdi_spec_dirs:
        folders = [str(folder) for folder in settings.cdi_spec_dirs]
        lines += ["[cdi]", f"specDirs = {_toml(folders)}"]
    else:
        # A specification can say that steps need no entitlement for a device.
        lines += ["[cdi]", "disabled = true"]
    lines += [
        "[history]",
        f"maxAge = {settings.history_max_age_seconds}",
        f"maxEntries = {settings.history_max_entries}",
    ]
    if settings.nameservers:
        lines += ["[dns]", f"nameservers = {_toml(list(settings.nameservers))}"]
    for host, registry in sorted(settings.registries.items()):
        lines.append(f"[registry.{_toml(host)}]")
        lines += [f"http = {_toml(registry.http)}", f"insecure = {_toml(registry.insecure)}"]
        if registry.mirrors:
            lines.append(f"mirrors = {_toml(list(registry.mirrors))}")
        if registry.ca_files:
            lines.append(f"ca = {_toml([str(path) for path in registry.ca_files])}")
    return "\n".join(lines) + "\n"


def _worker_lines(settings: DaemonSettings, runc: Path) -> list[str]:
    values: dict[str, object] = {
        "enabled": True,
        "binary": str(runc),
        "snapshotter": settings.snapshotter,
        "gc": True,
        "networkMode": settings.network_mode,
    }
    optional: dict[str, object] = {
        "reservedSpace": settings.gc_reserved_bytes,
        "maxUsedSpace": settings.gc_max_used_bytes,
        "minFreeSpace": settings.gc_min_free_bytes,
        "max-parallelism": settings.max_parallelism or None,
        "apparmor-profile": settings.apparmor_profile or None,
        "cniConfigPath": str(settings.cni_config_path) if settings.cni_config_path else None,
        "cniBinaryPath": str(settings.cni_binary_dir) if settings.cni_binary_dir else None,
        "cniPoolSize": settings.cni_pool_size or None,
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    return ["[worker.oci]", *(f"{key} = {_toml(value)}" for key, value in values.items())]


def _toml(value: object) -> str:
    """Return a value in TOML; strings, lists of strings, numbers and booleans look as in JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
