"""Starts one engine, as a program of its own; `python -c` runs `main`.

Three processes do it. The *launcher* makes the users and the root file system, becomes one of
these users, and starts the *first process* of the engine's namespaces as a child of the node: it
ends with the node, even by SIGKILL, and everything in its process namespace with it. A *finisher*,
which is still this machine's root, meanwhile mounts what can only be mounted now, and puts the
first process into its control groups. Neither of them stays.

The order matters:
- The network and process namespaces are made by the engine's users, so its root may set them up.
- /proc and /sys are mounted by this machine's root. Mounted by the engine's root, they would have
  to lie upon the machine's own, which could be uncovered.
- The first process moves to a mount namespace of the engine's users when all is mounted: that
  locks the mounts. It has its control groups then, which are all that it sees of them.

Sources: user_namespaces(7), mount_namespaces(7), pid_namespaces(7), cgroup_namespaces(7).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys

from offload_builder.node.sessions.engine import kernel
from offload_builder.node.sessions.engine.machinesockets import refuse_machine_sockets
from offload_builder.node.sessions.engine.rootfs import INIT, PROGRAMS, Root, init_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from offload_builder.node.sessions.engine.plan import NetworkPlan, Plan

_OPEN_FILES = 1 << 20
"""What docker's own unit gives the engine, on most machines (LimitNOFILE)."""
_LISTENER = 3
"""Number of the first descriptor that a service is handed (sd_listen_fds(3))."""
_FIRST = """\
sh -c 'export LISTEN_PID=$$; exec "$@"' sh "$@" & engine=$!
trap 'kill -TERM "$engine"' TERM
while :; do
    wait "$engine"
    code=$?
    kill -0 "$engine" 2>/dev/null || exit "$code"
done
"""
"""The first process waits for all that lose their parents, and ends with the engine."""
_PATH = f"{PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    """Start an engine as standard input says; lines of JSON on standard output tell how it goes."""
    try:
        kernel.die_with_parent()
        _launch(_read())
    except Exception as error:  # noqa: BLE001 - whatever it is, the node has to hear of it
        _say(error=f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _read() -> Any:
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    return json.loads(line)


def _say(**values: object) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def _launch(plan: Plan) -> None:
    _raise_open_files()
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    users = plan["users"]
    if not users:
        users = _make_users(plan["id_base"], plan["id_count"])
    _say(users=users)
    root = Root(plan)
    root.begin()
    network: NetworkPlan = _read()
    root.add_disk()
    root.write(network["files"])
    waiting, told = os.pipe(), os.pipe()
    finisher = os.fork()
    if finisher == 0:
        os.close(told[1])
        os.close(waiting[0])
        _run(lambda: _finish(plan, network, root, told[0], waiting[1]))
    os.close(told[0])
    os.close(waiting[1])
    namespace = os.open(network["namespace"], os.O_RDONLY | os.O_CLOEXEC)
    kernel.enter(users, kernel.CLONE_NEWUSER)
    _become_root()
    kernel.enter(namespace, kernel.CLONE_NEWNET)
    kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
    first = kernel.fork_sibling()
    if first == 0:
        os.close(told[1])
        _run(lambda: _begin(plan, waiting[0]))
    # All that wait for the finisher are to see when it is gone.
    os.close(waiting[0])
    os.write(told[1], b"%d\n" % first)
    os.close(told[1])
    _, status = os.waitpid(finisher, 0)
    os._exit(0 if status == 0 else 1)


def _raise_open_files() -> None:
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        files = min(_OPEN_FILES, int(file.read()))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    except (OSError, ValueError):
        # Not everybody's root may have more than it got.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(work: Any) -> NoReturn:
    """Do the work of a new process, which never returns to that of the old one."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - there is nobody above
        os.write(2, f"offload: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _make_users(base: int, count: int) -> str:
    """Make a user namespace; return a path that names it while this process is there."""
    made, done = os.pipe(), os.pipe()
    maker = os.fork()
    if maker == 0:
        os.close(made[0])
        os.close(done[1])
        _run(lambda: _hold_users(base, made[1], done[0]))
    os.close(made[1])
    os.close(done[0])
    try:
        if not os.read(made[0], 1):
            raise OSError("the kernel makes no user namespace")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{maker}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {base} {count}\n")
        users = os.open(f"/proc/{maker}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(made[0])
        os.close(done[1])
        os.waitpid(maker, 0)
    return f"/proc/{os.getpid()}/fd/{users}"


def _hold_users(base: int, made: int, done: int) -> None:
    # What the engine has of namespaces and inotify counts for whoever made its users. Were that
    # this machine's root, one engine could take from it and all others what the kernel permits.
    kernel.act_as(base)
    kernel.die_with_parent()
    kernel.unshare(kernel.CLONE_NEWUSER)
    os.write(made, b".")
    os.read(done, 1)


def _become_root() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # The change of the user has cleared it.
    kernel.die_with_parent()


def _finish(plan: Plan, network: NetworkPlan, root: Root, told: int, waiting: int) -> None:
    """Do what needs the first process: it is there, and waits."""
    kernel.die_with_parent()
    with os.fdopen(told) as stream:
        line = stream.readline()
    if not line:
        raise OSError("the engine's first process was not started")
    first = int(line)
    _say(pid=first)
    kernel.enter(network["namespace"], kernel.CLONE_NEWNET)
    for family in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        # With its own rules for nftables the engine does not do so itself, and wants it done.
        if os.path.exists(f"/proc/sys/net/{family}"):
            with open(f"/proc/sys/net/{family}", "w", encoding="ascii") as file:
                file.write("1")
    root.mount_sys()
    root.add_groups()
    kernel.enter(f"/proc/{first}/ns/pid", kernel.CLONE_NEWPID)
    inside = os.fork()
    if inside == 0:
        _run(root.mount_proc)
    _, status = os.waitpid(inside, 0)
    if status:
        raise OSError("/proc of the engine cannot be mounted")
    with contextlib.ExitStack() as opened:
        groups = [
            opened.enter_context(open(f"{folder}/cgroup.procs", "w", encoding="ascii"))
            for _, folder in plan["groups"]
        ]
        # Whoever has made the engine's users may choose its processors; this machine's root may
        # only with CAP_SYS_NICE, which a node gives up.
        kernel.act_as(plan["id_base"])
        kernel.die_with_parent()
        for group in groups:
            group.write(str(first))
            group.flush()
    kernel.act_as(0)
    kernel.die_with_parent()
    kernel.change_root(plan["root"])
    # The node has the number on its disk by now.
    if not sys.stdin.readline():
        raise OSError("the node is gone")
    os.write(waiting, b".")


def _begin(plan: Plan, waiting: int) -> None:
    """Become the engine's first process; standard output is closed, so the node knows."""
    kernel.die_with_parent()
    if not os.read(waiting, 1):
        os._exit(1)
    os.close(waiting)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWCGROUP)
    # As on other machines: mounts that containers share reach each other, but nobody else.
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_SHARED)
    quiet = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", quiet | kernel.MS_NOEXEC, "mode=1777")
    kernel.mount("mqueue", "/dev/mqueue", "mqueue", quiet | kernel.MS_NOEXEC)
    terminals = "newinstance,ptmxmode=0666,mode=0620,gid=5"
    kernel.mount("devpts", "/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, terminals)
    if program := init_program():
        kernel.mount("tmpfs", os.path.dirname(INIT), "tmpfs", quiet, "mode=755,size=8m")
        with open(program, "rb") as source, open(INIT, "wb") as target:
            target.write(source.read())
        os.chmod(INIT, 0o755)  # noqa: S103 - a program for all containers
    if plan["unified"]:
        # A group with processes passes no controllers on.
        with open("/sys/fs/cgroup/init/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")
    os.setsid()
    os.umask(0o022)
    kernel.set_hostname(plan["hostname"])
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.dup2(plan["listener"], _LISTENER, inheritable=True)
    os.closerange(_LISTENER + 1, 1024)
    refuse_machine_sockets()
    environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "LISTEN_FDS": "1"}
    os.execve("/bin/sh", ["sh", "-c", _FIRST, "sh", *plan["command"]], environment)  # noqa: S606
