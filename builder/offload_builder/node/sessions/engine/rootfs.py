"""The root file system of an engine; part of its launcher, which has few imports.

It is made by this machine's root, so in the engine's own namespaces, which belong to other users,
nothing of it can be unmounted, made writable, or uncovered.
"""

from __future__ import annotations

import os
import stat

from offload_builder.node.sessions.engine import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from offload_builder.node.sessions.engine.plan import Plan

PROGRAMS = "/offload/bin"
DATA = "/var/lib/docker"
BINDS = "/offload/binds"
"""Where directories of members' machines are, in the root file system of an engine."""
INIT = "/offload/init/docker-init"
"""What is the first process of containers with `--init`. Not where this machine has it: a container
mounts it without some of the flags that all of this machine's directories have in an engine."""
_INITS = ("/usr/libexec/docker/docker-init", "/usr/bin/docker-init", "/usr/bin/tini-static")
_DISK = "/.disk"
_SIZE = "64m"
_FOLDERS = (
    "/dev/pts", "/dev/shm", "/dev/mqueue", "/etc", "/mnt", "/opt", "/proc", "/root", "/run",
    "/srv", "/sys", "/tmp", "/usr", DATA, PROGRAMS, BINDS, "/offload/init", _DISK,
)  # fmt: skip
_ON_DISK = (("docker", DATA, 0o710), ("binds", BINDS, 0o755))
_NODES = (
    ("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7),
    ("/dev/random", 1, 8), ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0),
)  # fmt: skip
_LINKS = (
    ("/dev/ptmx", "pts/ptmx"), ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"), ("/dev/stderr", "/proc/self/fd/2"),
    ("/var/run", "/run"), ("/var/tmp", "/tmp"),
)  # fmt: skip


def init_program() -> str:
    """Return the program for `INIT`, also within an engine; empty when this machine has none."""
    return next((path for path in _INITS if os.path.exists(path)), "")


class Root:
    """Makes the file system below a directory, in a mount namespace that is the launcher's alone.

    Args:
        plan: of the start.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._root = plan["root"]
        self._base = plan["id_base"]

    def begin(self) -> None:
        """Make everything that needs neither the disk nor the network.

        Raises:
            OSError: the kernel refuses.
        """
        plan = self._plan
        owner = f"uid={self._base},gid={self._base}"
        kernel.mount(
            "tmpfs", self._root, "tmpfs", kernel.MS_NOSUID, f"mode=755,size={_SIZE},{owner}"
        )
        for folder in _FOLDERS:
            self._folder(folder)
        os.chmod(self._at("/tmp"), 0o1777)  # noqa: S103 - as everywhere
        for place, target in (*_LINKS, *plan["links"]):
            os.symlink(target, self._at(place))
        for source in plan["binds"]:
            self._show(source, source)
        for source, place in plan["programs"]:
            self._show(source, place)
        for path, major, minor in _NODES:
            self._node(path, "c", major, minor)
        for path, kind, major, minor in plan["nodes"]:
            self._node(path, kind, major, minor)
        for source in plan["device_files"]:
            if not os.path.exists(self._at(source)):
                self._show(source, source)
        self.write(plan["files"])

    def write(self, files: list[tuple[str, str]]) -> None:
        """Write small files.

        Raises:
            OSError: they cannot be written.
        """
        for place, text in files:
            self._folder(os.path.dirname(place))
            with open(self._at(place), "w", encoding="utf-8") as file:
                file.write(text)
            self._own(place)

    def add_disk(self) -> None:
        """Mount the disk, where only some of its directories are seen.

        Whatever the engine does, the directory that holds these is out of its reach: what we open
        when it is mounted again are still directories.

        Raises:
            OSError: the kernel refuses.
        """
        disk = self._at(_DISK)
        kernel.mount_disk(self._plan["disk"], disk, self._at("/dev/.loop"))
        for name, place, mode in _ON_DISK:
            folder = f"{disk}/{name}"
            if not os.path.isdir(folder):
                os.mkdir(folder)
                os.chmod(folder, mode)
                os.chown(folder, self._base, self._base)
            kernel.mount(folder, self._at(place), flags=kernel.MS_BIND)
        kernel.unmount(disk)
        os.rmdir(disk)

    def add_groups(self) -> None:
        """Mount the engine's own control groups; /sys is mounted.

        Raises:
            OSError: the kernel refuses.
        """
        place = self._at("/sys/fs/cgroup")
        groups = self._plan["groups"]
        if self._plan["unified"]:
            kernel.mount(groups[0][1], place, flags=kernel.MS_BIND)
            return
        kernel.mount(
            "tmpfs", place, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m"
        )
        for name, folder in groups:
            if name:
                os.mkdir(f"{place}/{name}")
                kernel.mount(folder, f"{place}/{name}", flags=kernel.MS_BIND)
        for name, target in self._plan["group_links"]:
            os.symlink(target, f"{place}/{name}")

    def mount_sys(self) -> None:
        """Mount /sys of the network namespace that we are in.

        Raises:
            OSError: the kernel refuses.
        """
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("sysfs", self._at("/sys"), "sysfs", flags)

    def mount_proc(self) -> None:
        """Mount /proc of the process namespace that we are in.

        Raises:
            OSError: the kernel refuses.
        """
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", self._at("/proc"), "proc", flags)

    def _at(self, place: str) -> str:
        return self._root + place

    def _own(self, place: str) -> None:
        os.chown(self._at(place), self._base, self._base, follow_symlinks=False)

    def _folder(self, place: str) -> None:
        made = ""
        for part in place.split("/")[1:]:
            made = f"{made}/{part}"
            if not os.path.isdir(self._at(made)):
                os.mkdir(self._at(made), 0o755)
                self._own(made)

    def _show(self, source: str, place: str) -> None:
        if os.path.isdir(source):
            self._folder(place)
        else:
            self._folder(os.path.dirname(place))
            os.close(os.open(self._at(place), os.O_CREAT | os.O_CLOEXEC, 0o644))
        kernel.bind_read_only(source, self._at(place))

    def _node(self, path: str, kind: str, major: int, minor: int) -> None:
        """Make a device node that is the engine's: the machine's may be for its root only."""
        self._folder(os.path.dirname(path))
        if not os.path.lexists(self._at(path)):
            mode = stat.S_IFBLK if kind == "b" else stat.S_IFCHR
            os.mknod(self._at(path), mode | 0o666, os.makedev(major, minor))
            # Without what the umask takes away.
            os.chmod(self._at(path), 0o666)  # noqa: S103 - who may use it is up to the engine
            self._own(path)
