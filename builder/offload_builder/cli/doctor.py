"""`offload-builder doctor`: what a node needs on this machine, and how to get what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from offload_core.errors import ConfigError, OffloadError

MINIMUM_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


def examine(data: Path) -> list[Check]:
    """Look at everything that a node needs."""
    return [
        _python(),
        Check(
            "root",
            os.geteuid() == 0,
            "user is root" if os.geteuid() == 0 else "user is not root",
            "run nodes as root: BuildKit mounts file systems and starts containers",
        ),
        _buildkitd(),
        _program("runc", "apt-get install runc"),
        _program("setpriv", "apt-get install util-linux"),
        _program("iptables", "apt-get install iptables", required=False),
        _minio(),
        _overlayfs(),
        _cgroups(),
        _disk(data),
    ]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _program(name: str, remedy: str, *, required: bool = True) -> Check:
    path = shutil.which(name)
    return Check(name, path is not None, path or "not found", remedy, required)


def _buildkitd() -> Check:
    from offload_builder.buildkit.daemon_config import find_buildkitd
    from offload_builder.provider.process import tools_directory

    try:
        return Check("buildkitd", ok=True, detail=str(find_buildkitd(None, [tools_directory()])))
    except OffloadError as error:
        return Check("buildkitd", ok=False, detail="not found", remedy=error.message)


def _minio() -> Check:
    from offload_builder.provider.process import find_minio

    try:
        return Check("minio", ok=True, detail=str(find_minio()), required=False)
    except ConfigError as error:
        return Check("minio", ok=False, detail="not found", remedy=error.message, required=False)


def _overlayfs() -> Check:
    listed = Path("/proc/filesystems")
    ok = Path("/sys/module/overlay").exists() or (
        listed.exists() and "overlay" in listed.read_text()
    )
    detail = "supported" if ok else "not listed by the kernel"
    remedy = "load it with 'modprobe overlay'; without it snapshots are slow copies"
    return Check("overlayfs", ok, detail, remedy, required=False)


def _cgroups() -> Check:
    path = Path("/sys/fs/cgroup")
    if (path / "cgroup.controllers").exists():
        return Check("cgroups", ok=True, detail="version 2")
    ok = (path / "memory").is_dir()
    return Check(
        "cgroups", ok, "version 1" if ok else "not mounted", "mount the cgroup file systems"
    )


def _disk(data: Path) -> Check:
    folder = data.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free below {folder}"
    return Check("disk", free >= MINIMUM_FREE_BYTES, detail, "free some space, 5 GiB at least")


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/offload"),
    show_default=True,
    help="Directory that will hold the node's data.",
)
@click.option(
    "--format", "output", type=click.Choice(("table", "json")), default="table", show_default=True
)
def doctor(data: Path, output: str) -> None:
    """Find parts that are missing on this machine and say how to get them.

    Exits with 1 when something that a node needs is missing.
    """
    checks = examine(data)
    if output == "json":
        import json

        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok     " if check.ok else ("MISSING" if check.required else "absent ")
            click.echo(f"{mark}  {check.name:<10} {check.detail}")
            if not check.ok:
                click.echo(f"         {'':<10} -> {check.remedy}")
    if any(check.required and not check.ok for check in checks):
        raise SystemExit(1)
