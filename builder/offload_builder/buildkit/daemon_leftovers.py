"""What a daemon leaves when killed or stopped at work: containers, mounts, itself; all is ended.

Source: BuildKit's runc executor keeps each running container's bundle in a directory below
`<root>/runc-<snapshotter>/executor`, named as the container; runc keeps its state below /run/runc,
where `state.json` has the bundle as a label (libcontainer's `BaseState`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
from pathlib import Path

import structlog

from offload_builder.mountinfo import read_mounts

_log = structlog.get_logger(__name__)
_MNT_DETACH = 2
_RUNC_SECONDS = 15.0
_RUNC_STATES = Path("/run/runc")


async def end_leftovers(root: Path, runc: Path) -> None:
    """End containers of a daemon that no longer runs, and undo its mounts below `root`."""
    bundles = leftover_bundles(root)
    containers = {bundle.name for bundle in bundles}
    containers |= await asyncio.to_thread(_containers_of, root)
    for container in sorted(containers):
        await _delete_container(runc, container)
    for mount in reversed(mounts_below(root)):
        _unmount(mount)
    for bundle in bundles:
        # Never through a mount: it would delete the files of the step's result.
        if not mounts_below(bundle):
            await asyncio.to_thread(shutil.rmtree, bundle, ignore_errors=True)


def leftover_bundles(root: Path) -> list[Path]:
    """Return the bundles of containers below `root`; they are named as the containers."""
    return sorted(path.parent for path in root.glob("runc-*/executor/*/config.json"))


def _containers_of(root: Path) -> set[str]:
    """Return the containers that runc knows and whose bundles are, or were, below `root`.

    BuildKit deletes the bundle of a step that it has failed to end. So it does when its own stop
    comes between: a signal to its group ends the runc that was to end the step.
    """
    beginnings = tuple(f"bundle={folder}/runc-" for folder in {root, root.resolve()})
    found = set()
    for path in _RUNC_STATES.glob("*/state.json"):
        # Those of others come and go meanwhile.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            labels = json.loads(path.read_bytes())["config"]["labels"]
            if any(label.startswith(beginnings) for label in labels):
                found.add(path.parent.name)
    return found


async def _delete_container(runc: Path, container: str) -> None:
    process = await asyncio.create_subprocess_exec(
        str(runc),
        "delete",
        "--force",
        container,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_RUNC_SECONDS):
            code = await process.wait()
        _log.info("buildkit.container.ended", container=container, exit_code=code)
    except TimeoutError:
        _log.warning("buildkit.container.stuck", container=container, waited_seconds=_RUNC_SECONDS)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def mounts_below(root: Path) -> list[str]:
    """Return the mount points strictly below `root`, in the order of mounting."""
    prefix = f"{root.resolve()}/"
    return [mount.point for mount in read_mounts() if mount.point.startswith(prefix)]


def _unmount(point: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(point), _MNT_DETACH) != 0:
        error = os.strerror(ctypes.get_errno())
        _log.warning("buildkit.mount.stuck", path=point, error=error)


async def end_previous_daemon(pid_file: Path, root: Path, timeout: float = 10.0) -> None:
    """End the daemon of an earlier run that still holds `root`.

    The number in the file is believed only if that process names our root on its command line.
    """
    pid = _read_pid(pid_file)
    if pid is None or not _is_daemon_of(pid, root):
        return
    _log.warning("buildkit.daemon.leftover", pid=pid, root=str(root))
    # The process is one of an earlier agent: it is not our child, so its end is polled.
    for number, share in ((signal.SIGTERM, 0.7), (signal.SIGKILL, 0.3)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if await _gone(pid, root, timeout * share):
            return


async def _gone(pid: int, root: Path, timeout: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout
    while _is_daemon_of(pid, root):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _read_pid(pid_file: Path) -> int | None:
    try:
        text = pid_file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _is_daemon_of(pid: int, root: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(f"--root={root}") in arguments
