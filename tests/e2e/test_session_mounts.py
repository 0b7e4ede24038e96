"""Directories of a member in containers of a session: the whole pool, and docker's own commands."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.sessionengine import TOOLS
from tests.fixtures.sessionpool import IMAGE, SessionMember, SessionPool, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(400)
USER = 12345
"""A member's user id on their machine."""
OTHER = 4242


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    with SessionPool("one", node={"OFFLOAD_NODE_SESSION_IDLE": "1h"}) as running:
        yield running


@pytest.fixture(scope="module")
def ann(pool: SessionPool) -> SessionMember:
    member = pool.member("ann")
    member.start()
    return member


@pytest.fixture
def app(ann: SessionMember) -> Iterator[Path]:
    """A project, in the member's home."""
    folder = ann.home / "app"
    (folder / "src/deep").mkdir(parents=True)
    (folder / "a.txt").write_text("here\n")
    (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("a.txt")
    (folder / "src/old").write_text("old\n")
    (folder / "src/old").chmod(0o640)
    (folder / "src/gone").write_text("gone\n")
    yield folder
    shutil.rmtree(folder)


def runs(member: SessionMember, script: str, *options: str) -> str:
    """Run a script in a container, and return what it printed."""
    return member.docker_well("run", "--rm", *options, IMAGE, "sh", "-ec", script)


def fails(member: SessionMember, *options: str, script: str = "true") -> tuple[int, str]:
    """Run a script in a container that must fail; return its exit code and what docker said."""
    done = member.docker("run", "--rm", *options, IMAGE, "sh", "-c", script)
    assert done.returncode != 0, done.stdout
    return done.returncode, done.stderr


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def test_container_has_the_files_of_here_and_here_has_what_it_did(
    ann: SessionMember, app: Path
) -> None:
    said = runs(ann, """
        cat link; ./run.sh; stat -c '%u:%g %a' src/old . ; ls -A
        echo new > new; chmod 750 new; ln -s ../new src/link; rm src/gone; mv src/old src/moved
        rmdir src/deep; mkdir made; echo x > 'made/a name'; echo more >> a.txt
        chown 4242:4242 a.txt; echo s > special; chmod 4755 special; mkfifo pipe
        """, "-v", f"{app}:/app", "-w", "/app")  # fmt: skip
    assert said.split() == ["here", "ran", "0:0", "640", "0:0", "755", "a.txt", "link", "run.sh",
                            "src"]  # fmt: skip
    assert (app / "a.txt").read_text() == "here\nmore\n"
    assert owner_and_mode(app / "a.txt")[:2] == (os.getuid(), os.getgid())
    assert owner_and_mode(app / "new") == (os.getuid(), os.getgid(), 0o750)
    assert str((app / "src/link").readlink()) == "../new"
    assert sorted(path.name for path in (app / "src").iterdir()) == ["link", "moved"]
    assert owner_and_mode(app / "src/moved")[2] == 0o640
    assert (app / "made/a name").read_text() == "x\n"
    # Nothing that gains rights, and nothing that blocks whoever opens it, comes here.
    assert owner_and_mode(app / "special")[2] == 0o755
    assert not (app / "pipe").exists()


def test_container_that_must_not_write_does_not(ann: SessionMember, app: Path) -> None:
    for option in (
        ("-v", f"{app}:/app:ro"),
        ("--mount", f"type=bind,src={app},dst=/app,readonly"),
    ):
        code, said = fails(ann, *option, script="cat /app/a.txt; echo x > /app/a.txt")
        assert (code, "Read-only file system" in said) == (1, True)
    code, said = fails(ann, "-u", "4242", "-v", f"{app}:/app", script="echo x > /app/mine")
    assert "Permission denied" in said
    assert not (app / "mine").exists()
    app.chmod(0o777)
    assert runs(ann, "id -u > /app/mine", "-u", "4242", "-v", f"{app}:/app") == ""
    assert (app / "mine").read_text() == "4242\n"
    assert owner_and_mode(app / "mine")[:2] == (os.getuid(), os.getgid())


def test_running_container_sees_edits_and_we_see_its_own(ann: SessionMember, app: Path) -> None:
    ann.docker_well("run", "-d", "--name", "live", "-v", f"{app}:/app", "-v",
                    f"{app}/a.txt:/single", IMAGE, "sleep", "600")  # fmt: skip

    def there(path: str) -> str:
        return ann.docker("exec", "live", "cat", path).stdout

    (app / "a.txt").write_text("edited\n")
    until(lambda: there("/single") == there("/app/a.txt") == "edited\n", "an edit")
    # Editors replace files; the container goes on with the one that it has.
    (app / "swap").write_text("replaced\n")
    (app / "swap").rename(app / "a.txt")
    until(lambda: there("/single") == there("/app/a.txt") == "replaced\n", "another edit")
    (app / "src").rename(app / "sources")
    until(lambda: there("/app/sources/old") == "old\n", "a directory's new name")
    assert ann.docker("exec", "live", "test", "-e", "/app/src").returncode == 1
    ann.docker_well("exec", "live", "sh", "-c", "echo back > /single; echo made > /app/made")
    until(lambda: (app / "made").exists() and (app / "a.txt").read_text() == "back\n", "its files")
    ann.docker_well("exec", "live", "sh", "-c", "seq 100000 > /app/long")
    ann.docker_well("rm", "-f", "live")
    assert (app / "long").read_text().splitlines()[-1] == "100000"


def test_directory_that_was_replaced_has_nothing_of_the_one_before(ann: SessionMember) -> None:
    folder = ann.home / "replaced"
    folder.mkdir()
    runs(ann, "echo made > /app/made", "-v", f"{folder}:/app")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "only").write_text("")
    assert runs(ann, "ls -A /app", "-v", f"{folder}:/app") == "only\n"
    assert [path.name for path in folder.iterdir()] == ["only"]


def test_sources_are_what_docker_takes_for_sources(ann: SessionMember, app: Path) -> None:
    runs(ann, "echo 1 > /new/file", "-v", f"{app}/missing/dir:/new")
    assert (app / "missing/dir/file").read_text() == "1\n"
    assert runs(ann, "cat /app/a.txt", "-v", "./app:/app") == "here\n"
    single = runs(ann, "cat /one; echo 2 >> /one", "-v", f"{app}/a.txt:/one")
    assert (single, (app / "a.txt").read_text()) == ("here\n", "here\n2\n")
    runs(ann, "echo kept > /v/file", "-v", "kept:/v")
    assert runs(ann, "cat /v/file", "-v", "kept:/v") == "kept\n"
    runs(ann, "test -S /var/run/docker.sock", "-v", "/var/run/docker.sock:/var/run/docker.sock")


def test_refusals_are_as_docker_puts_them(ann: SessionMember, app: Path) -> None:
    said = "Error response from daemon: "
    for source in ("/", "/proc", "/var/run", str(ann.home)):
        code, error = fails(ann, "-v", f"{source}:/x")
        assert (code, said in error, "cannot be mounted into a session" in error) == (
            125,
            True,
            True,
        )
    missing = f"type=bind,src={app}/missing,dst=/x"
    assert fails(ann, "--mount", missing)[0] == 125
    assert f"bind source path does not exist: {app}/missing" in fails(ann, "--mount", missing)[1]
    assert not (app / "missing").exists()
    code, error = fails(ann, "-v", f"{app}:/x:nope")
    assert (code, "invalid mode: nope" in error) == (125, True)
    done = ann.docker("run", "--rm", "-v", f"{app}:/x", IMAGE, "/x")
    assert done.returncode == 126, done.stderr
    assert ann.docker("run", "--rm", "-v", f"{app}:/x", IMAGE, "/x/no").returncode == 127
    assert ann.docker_well("ps", "-aq") == ""


COMPOSED = """
services:
  one:
    image: box:1
    command: sh -ec 'cat /app/a.txt /setting; echo composed > /made/file; echo 1 > /own/file'
    volumes:
      - ./app:/app
      - type: bind
        source: ./app/run.sh
        target: /setting
        read_only: true
      - ./app/made:/made
      - own:/own
volumes:
  own:
"""


def test_compose_mounts_what_is_beside_its_file(ann: SessionMember, app: Path) -> None:
    (ann.home / "compose.yml").write_text(COMPOSED)
    plugins = ann.home / ".docker/cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    (plugins / "docker-compose").symlink_to(TOOLS / "docker-compose")
    said = ann.docker_well("compose", "up", "--no-color")
    assert "one-1  | here\n" in said
    assert "echo ran" in said
    assert (app / "made/file").read_text() == "composed\n"
    ann.docker_well("compose", "down", "-v")
    assert not (app / "own").exists()


def test_directory_of_a_build_does_not_travel_again(ann: SessionMember, app: Path) -> None:
    content = os.urandom(3 << 20)
    (app / "data").write_bytes(content)
    (app / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    built = ann.build(app)
    assert built.returncode == 0, built.stderr
    folder = ann.home / "copy"
    folder.mkdir()
    (folder / "data").write_bytes(content)
    assert runs(ann, "wc -c < /copy/data", "-v", f"{folder}:/copy:ro") == f"{len(content)}\n"
    (told,) = [one for one in ann.view()["directories"] if one["path"] == str(folder)]
    assert (told["state"], told["two_way"], told["entries_there"]) == ("same", False, 1)
    assert told["sent_bytes"] < 1 << 20
    (folder / "data").write_bytes(os.urandom(1 << 20))
    runs(ann, "true", "-v", f"{folder}:/copy:ro")
    (told,) = [one for one in ann.view()["directories"] if one["path"] == str(folder)]
    assert told["sent_bytes"] >= 1 << 20


def test_session_that_slept_goes_on_with_its_directories_and_its_end_brings_the_last_files(
    pool: SessionPool,
) -> None:
    ben = pool.member("ben")
    ben.start("--idle-timeout", "5s")
    folder = ben.home / "app"
    folder.mkdir()
    (folder / "file").write_text("1\n")
    runs(ben, "echo 1 > /app/made", "-v", f"{folder}:/app")
    until(lambda: ben.view()["state"] == "paused", "the pause")
    (folder / "file").write_text("2\n")
    (folder / "made").unlink()
    assert runs(ben, "cat /app/file; ls /app", "-v", f"{folder}:/app") == "2\nfile\n"
    script = "head -c 20000000 /dev/urandom > /app/large; touch /tmp/done; sleep 600"
    ben.docker_well(
        "run", "-d", "--name", "last", "-v", f"{folder}:/app", IMAGE, "sh", "-c", script
    )
    until(lambda: ben.docker("exec", "last", "test", "-e", "/tmp/done").returncode == 0, "a file")
    ben.well("stop", "-f")
    assert (folder / "large").stat().st_size == 20_000_000
    assert (folder / "file").read_text() == "2\n"


def as_user(member: SessionMember, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user of this machine who is not root."""
    # Python may be where only root can look.
    look = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    drop = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *look]
    return subprocess.run(
        [*drop, *words], env=member.environment, cwd=member.home, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_files_of_a_user_who_is_not_root_have_their_ids_in_containers(
    pool: SessionPool,
) -> None:
    eve = pool.member("eve")
    pool.folder.chmod(0o711)
    folder = eve.home / "app"
    folder.mkdir(mode=0o700)
    (folder / "file").write_text("mine\n")
    for path in (eve.home, *eve.home.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    try:
        done = as_user(eve, "offload", "start", "-q")
        assert done.returncode == 0, done.stderr
        load = as_user(eve, "docker", "load", "-q", "-i", str(pool.archive))
        assert load.returncode == 0, load.stderr
        run = ("docker", "run", "--rm", "-v", f"{folder}:/app")
        done = as_user(eve, *run, IMAGE, "sh", "-c",
                       "stat -c '%u:%g' /app /app/file; echo r > /app/of-root")  # fmt: skip
        assert done.stdout.split() == [f"{USER}:{USER}"] * 2, done.stderr
        script = "id -u; echo more >> /app/file; cat /app/of-root; rm /app/of-root"
        done = as_user(eve, *run, "-u", f"{USER}:{USER}", IMAGE, "sh", "-c", script)
        assert done.stdout.split() == [str(USER), "r"], done.stderr
        done = as_user(eve, *run, "-u", str(OTHER), IMAGE, "cat", "/app/file")
        assert (done.returncode, "Permission denied" in done.stderr) == (1, True)
        assert (folder / "file").read_text() == "mine\nmore\n"
        assert owner_and_mode(folder / "file")[:2] == (USER, USER)
        assert not (folder / "of-root").exists()
    finally:
        as_user(eve, "offload", "stop", "-f")
