"""Network namespaces without a name, and threads that live in one.

A namespace that only descriptors hold ends with the process that has them, however that ends, and
the kernel takes its devices, addresses and rules along. So there is nothing to find and to remove
after a crash. While it lives, `path` names it for `nsenter`, `ip` and people.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_OWN = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


class NetworkNamespace:
    """A network namespace with one thread in it; close it.

    Attributes:
        name: for logs and the name of the thread.
    """

    def __init__(
        self, name: str, existing: Path | None = None, *, users: Path | None = None
    ) -> None:
        """Make a namespace, or hold one that exists.

        Args:
            name: see above.
            existing: path of the one to hold.
            users: path of the user namespace that owns a new one; None for this process's.

        Raises:
            ConfigError: the kernel or our rights do not allow it.
        """
        self.name = name
        self._descriptor = -1
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"net-{name}")
        try:
            self._descriptor = self._threads.submit(_enter, existing, users).result()
        except OSError as error:
            self._threads.shutdown()
            raise ConfigError(
                f"no network namespace can be had: {error.strerror}",
                hint="the node needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN) for isolation = netns",
            ) from error

    @property
    def path(self) -> Path:
        """A path of the namespace, while this object is open."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Do blocking work in the namespace; one piece at a time, in the order of the calls.

        Processes that it starts, sockets that it opens and /proc/sys/net are of the namespace.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)

    async def listen_tcp(self, address: str, port: int = 0) -> socket.socket:
        """Return a TCP socket that listens in the namespace, for use by any thread.

        Raises:
            OSError: the address is not there, or the port is taken.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return await self.run(
            lambda: socket.create_server((address, port), family=family, backlog=256)
        )

    async def bind_udp(self, address: str, port: int) -> socket.socket:
        """Return a UDP socket that is bound in the namespace, for use by any thread.

        Raises:
            OSError: the address is not there, or the port is taken.
        """

        def bound() -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = socket.socket(family, socket.SOCK_DGRAM)
            try:
                made.setblocking(False)
                made.bind((address, port))
            except BaseException:
                made.close()
                raise
            return made

        return await self.run(bound)

    def close(self) -> None:
        """Let go of the namespace; it ends with the last process and socket in it."""
        self._threads.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _enter(existing: Path | None, users: Path | None) -> int:
    """Move this thread to a namespace and return a descriptor of it."""
    if existing is None and users is not None:
        return _join(_make_owned(users))
    if existing is None:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            raise _last_error()
        return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    return _join(os.open(existing, os.O_RDONLY | os.O_CLOEXEC))


def _make_owned(users: Path) -> int:
    """Return a descriptor of a new namespace that belongs to a user namespace.

    Threads cannot enter user namespaces, so another process makes it.
    """
    maker = subprocess.Popen(
        ["nsenter", f"--user={users}", "unshare", "--net", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with maker:
        if maker.stdin is None or maker.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            # It answers once it is where it has to be.
            maker.stdin.write(b".")
            maker.stdin.flush()
            if maker.stdout.read(1) != b".":
                raise OSError(errno.EPERM, f"the user namespace {users} cannot be entered")
            return os.open(f"/proc/{maker.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            maker.kill()


def _join(descriptor: int) -> int:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        error = _last_error()
        os.close(descriptor)
        raise error
    return descriptor


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
