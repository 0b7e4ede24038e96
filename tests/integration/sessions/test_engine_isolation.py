"""What containers of an engine can do, and what they can not: real engines, one hostile."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from offload_builder.node.sessions.engine.groups import EngineGroups
from offload_builder.node.sessions.engine.idranges import COUNT
from tests.fixtures.sessionengines import LIMITS, MIB, EngineLoop, docker, engine_settings, run

pytestmark = pytest.mark.timeout(300)
NS_GET_OWNER_UID = 0xB704
"""ioctl_ns(2)."""


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with EngineLoop(engine_settings(tmp_path_factory.mktemp("engines") / "data")) as made:
        yield made


@pytest.fixture(scope="module")
def engine(loop):
    return loop.engine()


@pytest.fixture(scope="module")
def other(loop):
    return loop.engine()


def test_containers_run_and_their_exit_code_is_docker_s(engine):
    done = run(engine, script="echo out; echo err >&2; exit 3")

    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_images_are_built_with_steps(engine):
    text = b'FROM box\nRUN ["/bin/busybox", "sh", "-c", "echo made > /made"]\n'

    done = docker(engine, "build", "--network", "none", "-t", "built", "-", stdin=text)

    assert done.returncode == 0, done.stderr
    shown = docker(engine, "run", "--rm", "built", "cat", "/made")
    assert shown.stdout == "made\n", shown.stderr


def test_containers_reach_each_other_by_name_and_a_port_is_published(engine):
    assert docker(engine, "network", "create", "net").returncode == 0
    serve = ("/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "echo", "hello")
    named = ("--name", "web", "--network", "net", "-p", "8080:80")
    begun = docker(engine, "run", "-d", *named, "box", *serve)
    assert begun.returncode == 0, begun.stderr

    # Programs that are linked statically do not ask name servers by themselves.
    ask = """for i in 1 2 3 4 5; do
        at=$(busybox nslookup web | busybox grep -o '172[0-9.]*')
        busybox nc $at 80 && exit
        busybox sleep 1
    done; exit 1"""
    asked = docker(
        engine, "run", "--rm", "--network", "net", "box", "/bin/busybox", "sh", "-c", ask
    )
    from_engine = subprocess.run(
        ["nsenter", f"--net=/proc/{engine.pid}/ns/net", "busybox", "nc", "127.0.0.1", "8080"],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    docker(engine, "rm", "-f", "web")

    assert asked.stdout == "hello\n", asked
    assert from_engine.stdout == b"hello\n"


def test_privileged_containers_see_nothing_of_the_machine(engine, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("machine")

    done = run(
        engine, "--privileged", "--pid=host", "-v", "/:/host",
        script=f"cat /host/etc/shadow; cat /host{secret}; ls /host/proc/1/root{tmp_path};"
        "for p in /proc/[0-9]*; do echo $p/ $(busybox readlink $p/exe); done",
    )  # fmt: skip

    assert "machine" not in done.stdout
    assert "can't open '/host/etc/shadow': No such file" in done.stderr
    assert "dockerd" in done.stdout
    assert str(engine.socket) not in done.stdout
    assert f"{os.getpid()}/" not in done.stdout


def test_the_engine_s_own_root_cannot_uncover_or_change_what_is_mounted(engine):
    done = run(
        engine, "--privileged", "--pid=host", "-v", "/:/host",
        # Into the mount namespace of dockerd itself.
        script="cd /host; for d in proc sys usr dev sys/fs/cgroup; do"
        " busybox nsenter -t 1 -m umount -l /$d && echo unmounted $d;"
        " busybox nsenter -t 1 -m mount -o remount,rw,bind /$d /$d && echo changed $d; done;"
        " busybox nsenter -t 1 -m /bin/sh -c 'echo x > /usr/written' && echo written;"
        " busybox nsenter -t 1 -m ls /proc | busybox grep -c '^[0-9]'",
    )  # fmt: skip

    assert "unmounted" not in done.stdout, done.stdout + done.stderr
    assert "written" not in done.stdout
    assert not Path("/usr/written").exists()
    # Of the engine only: its first process, dockerd, containerd, a shim, and ours.
    assert int(done.stdout.split()[-1]) < 30


def test_no_disk_of_the_machine_can_be_opened(engine):
    disk = Path("/").stat().st_dev
    make = f"busybox mknod /tmp/disk b {os.major(disk)} {os.minor(disk)} && echo made;"
    make += "busybox mknod /tmp/memory c 1 1 && echo made;"

    done = run(engine, "--privileged", script=f"{make} ls /dev; ls /dev/loop* /dev/vd*")

    assert "made" not in done.stdout
    devices = set(done.stdout.split())
    assert "null" in devices
    assert not devices & {"loop-control", "kvm", "mem", "vda", "sda"}


def test_control_groups_and_settings_of_the_kernel_stay_as_they_are(engine):
    groups = EngineGroups(engine_folder(engine).parent, engine.engine_id)
    limit = Path(dict(groups.own())["memory"]).parent / "memory.limit_in_bytes"
    kept = Path("/proc/sys/vm/swappiness").read_text()

    done = run(
        engine, "--privileged", "--cgroupns=host", "-v", "/:/host",
        script="mkdir -p /tmp/m; busybox mount -t cgroup -o memory cgroup /tmp/m;"
        "for f in /tmp/m/memory.limit_in_bytes /tmp/m/../memory.limit_in_bytes"
        " /host/sys/fs/cgroup/memory/memory.limit_in_bytes; do echo 8000000000 > $f; done;"
        "echo 1 > /proc/sys/vm/swappiness; echo x > /proc/sysrq-trigger;"
        "echo /bin/sh > /proc/sys/kernel/core_pattern; ls /tmp/m",
    )  # fmt: skip

    assert limit.read_text().strip() == str(LIMITS.memory_bytes)
    assert Path("/proc/sys/vm/swappiness").read_text() == kept
    assert "/bin/sh" not in Path("/proc/sys/kernel/core_pattern").read_text()
    assert "offload-sessions" not in done.stdout


def test_processes_of_the_machine_cannot_be_killed(engine):
    with subprocess.Popen(["sleep", "1000"]) as outside:
        run(engine, "--privileged", "--pid=host", script=f"busybox kill -9 {outside.pid}")
        ended = outside.poll()
        outside.kill()

    assert ended is None


def test_engines_have_users_images_and_processes_of_their_own(engine, other):
    docker(engine, "tag", "box", "mine")

    seen = run(other, "--privileged", "--pid=host", script="echo /proc/[0-9]*; busybox ps")

    assert abs(engine.id_base - other.id_base) >= COUNT
    assert Path(f"/proc/{engine.pid}").stat().st_uid == engine.id_base
    assert "mine" not in docker(other, "images").stdout
    assert f"/proc/{engine.pid}" not in seen.stdout.split()
    for kind in ("user", "pid", "mnt", "ipc", "uts", "net", "cgroup"):
        names = {
            Path(f"/proc/{one}/ns/{kind}").readlink() for one in (engine.pid, other.pid, "self")
        }
        assert len(names) == 3, kind


def test_sockets_past_the_network_are_refused_to_all_processes(engine):
    seen = run(
        engine, "--privileged", "--pid=host",
        script="for p in /proc/[0-9]*; do busybox grep ^Seccomp: $p/status; done",
    )  # fmt: skip

    assert {line.split()[1] for line in seen.stdout.splitlines()} == {"2"}, seen


def test_what_the_kernel_counts_for_users_is_counted_for_each_engine_alone(engine, other):
    owners = {owner_of_users(engine), owner_of_users(other)}

    # Namespaces and inotify: who made the users of an engine is who pays for what it has.
    assert owners == {engine.id_base, other.id_base}


def owner_of_users(engine) -> int:
    owner = array.array("I", [0])
    with Path(f"/proc/{engine.pid}/ns/user").open("rb") as namespace:
        fcntl.ioctl(namespace, NS_GET_OWNER_UID, owner)
    return owner[0]


def test_memory_of_an_engine_ends_containers_and_not_the_engine(engine):
    size = LIMITS.memory_bytes // MIB * 2

    # Held in the container itself: bigger than all that the engine may have.
    done = run(engine, script=f"busybox dd if=/dev/zero of=/dev/null bs={size}M count=1")

    assert done.returncode == 137, done
    assert run(engine, script="echo on").stdout == "on\n"


def test_processors_of_an_engine_are_bounded(engine):
    groups = EngineGroups(engine_folder(engine).parent, engine.engine_id)
    upper = Path(dict(groups.own())["cpu"]).parent

    quota, period = (
        int((upper / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
    )

    assert quota * 1000 == period * LIMITS.cpu_millis


def test_a_container_s_own_memory_limit_is_in_force(engine):
    done = run(
        engine, "--memory", "32m", script="busybox dd if=/dev/zero of=/dev/null bs=200M count=1"
    )

    assert done.returncode == 137, done


def test_processes_of_an_engine_are_bounded(engine):
    done = run(
        engine, script="i=0; while [ $i -lt 600 ]; do busybox sleep 30 & i=$((i+1)); done; echo all"
    )

    assert done.returncode != 0, done.stdout[-200:]
    assert "all" not in done.stdout
    assert run(engine, script="echo on").stdout == "on\n"


def test_a_full_disk_is_an_error_in_the_container_and_space_comes_back(other):
    before = other.disk_used()

    fill = "busybox dd if=/dev/zero of=/big bs=1M count=2000"
    done = run(other, script=f"{fill}; echo code $?; {fill}; busybox sync")

    assert "No space left on device" in done.stderr
    assert "code 1" in done.stdout
    assert other.disk_used() <= LIMITS.disk_bytes
    assert run(other, script="echo on").stdout == "on\n"
    # The file went with its container.
    assert other.disk_used() < before + 200 * MIB


def test_sockets_for_containers_are_the_engine_s_own(engine):
    done = run(engine, "-v", "/var/run/docker.sock:/s", script="busybox test -S /s && echo socket")

    assert done.stdout == "socket\n", done.stderr


def test_synchronised_directories_are_writable_for_this_machine(engine):
    folder = engine.root / "offload/binds/one"
    folder.mkdir()
    (folder / "file").write_text("from here")

    done = run(engine, "-v", "/offload/binds/one:/one", script="cat /one/file")

    assert done.stdout == "from here"


def engine_folder(engine) -> Path:
    with contextlib.suppress(OSError):
        backing = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
        return Path(next(text for text in backing if engine.engine_id in text).strip()).parent
    raise AssertionError("the engine has no disk")
