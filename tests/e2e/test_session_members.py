"""Who may use a session, and with which docker: shared, foreign, revoked, older and newer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.sessionpool import IMAGE, PATIENCE, SessionMember, SessionPool, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(400)
DEBIAN = "/usr/bin/docker"
"""Debian's docker 20.10, beside a newer one."""
TICKS = ("sh", "-c", "while :; do echo tick; usleep 100000; done")


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    with SessionPool("one") as running:
        yield running


@pytest.fixture(scope="module")
def ann(pool: SessionPool) -> SessionMember:
    """Somebody with a session in which the container `steady` runs."""
    member = pool.member("ann")
    member.start()
    member.docker_well("run", "-d", "--name", "steady", IMAGE, *TICKS)
    return member


@pytest.fixture(scope="module")
def ben(pool: SessionPool) -> SessionMember:
    return pool.member("ben")


def refusal(done: subprocess.CompletedProcess[str], name: str) -> tuple[int, str]:
    """Return how a command was refused, without the name that it was given."""
    return done.returncode, done.stderr.replace(name, "ID")


def test_session_of_others_is_as_unknown_as_none(ann: SessionMember, ben: SessionMember) -> None:
    session_id = str(ann.view()["session_id"])
    nobodys = "0123456789abcdef"
    for words in (("use",), ("share",)):
        theirs = refusal(ben.offload(*words, session_id), session_id)
        none = refusal(ben.offload(*words, nobodys), nobodys)
        assert theirs == none, words
        assert theirs[0] == 5, theirs
    assert session_id not in ben.well("ps", "--all")


def test_shared_session_is_used_until_it_is_shared_no_more(
    ann: SessionMember, ben: SessionMember
) -> None:
    session_id = str(ann.view()["session_id"])
    assert f"offload use {session_id}" in ann.well("share", "default", "ben")
    ben.well("use", session_id, "--name", "of-ann")
    assert ben.context == "docker-offload-of-ann"
    assert ben.docker_well("ps", "--format", "{{.Names}}") == "steady\n"
    ben.docker_well("run", "-d", "--name", "of-ben", IMAGE, *TICKS)
    assert "of-ben" in ann.docker_well("ps", "--format", "{{.Names}}")
    following, own = ben.begin("logs", "-f", "steady"), ann.begin("logs", "-f", "of-ben")
    for process in (following, own):
        assert process.stdout is not None
        assert process.stdout.readline() == "tick\n"
    ann.well("share", "default", "ben", "--remove")
    # His streams end, hers do not.
    following.communicate(timeout=PATIENCE)
    assert own.poll() is None
    asked = ben.docker("ps")
    assert asked.returncode == 1
    assert "there is no session" in asked.stderr
    until(lambda: ben.view()["state"] == "ended", "the news for the other one")
    assert refusal(ben.offload("use", session_id[:8]), session_id[:8])[0] == 5
    done = ben.offload("stop")
    assert done.returncode == 0, done.stderr
    assert (ben.names, ben.context) == ([], "")
    until(lambda: not ben.helpers(), "the end of the helper")
    assert ann.docker_well("rm", "-f", "of-ben") == "of-ben\n"
    own.communicate(timeout=PATIENCE)
    assert ann.view()["state"] == "running"


@pytest.mark.parametrize("program", ["docker", DEBIAN])
def test_docker_of_another_version_says_so_itself(ann: SessionMember, program: str) -> None:
    assert Path(DEBIAN).exists()
    least, most = ann.docker_well(
        "version", "-f", "{{.Server.MinAPIVersion}} {{.Server.APIVersion}}"
    ).split()
    old = ann.docker("ps", program=program, DOCKER_API_VERSION="1.24")
    assert old.returncode == 1
    assert f"client version 1.24 is too old. Minimum supported API version is {least}" in old.stderr
    new = ann.docker("ps", program=program, DOCKER_API_VERSION="1.99")
    assert new.returncode == 1
    assert f"client version 1.99 is too new. Maximum supported API version is {most}" in new.stderr
    known = ann.docker("ps", "--format", "{{.Names}}", program=program, DOCKER_API_VERSION="1.41")
    assert (known.returncode, known.stdout) == (0, "steady\n"), known.stderr


def test_docker_of_years_ago_works(pool: SessionPool, ann: SessionMember) -> None:
    def old(*words: str) -> str:
        return ann.docker_well(*words, program=DEBIAN)

    assert "20.10" in old("version", "-f", "{{.Client.Version}}")
    assert old("run", "--rm", IMAGE, "echo", "hi") == "hi\n"
    assert old("exec", "steady", "echo", "there") == "there\n"
    (ann.home / "file").write_text("text\n")
    old("cp", "file", "steady:/file")
    assert old("exec", "steady", "cat", "/file") == "text\n"
    old("load", "-q", "-i", str(pool.archive))
    following = ann.begin("logs", "-f", "--tail", "1", "steady", program=DEBIAN)
    assert following.stdout is not None
    assert following.stdout.readline() == "tick\n"
    following.terminate()
    following.communicate(timeout=PATIENCE)


def test_session_ends_with_the_token_that_it_was_started_with(pool: SessionPool) -> None:
    admin, eve = pool.member("root", "admin"), pool.member("eve")
    before = set(pool.traces("one"))
    session_id = eve.start()
    eve.docker_well("run", "-d", "--name", "steady", IMAGE, *TICKS)
    # Processes of others have the same names.
    made = {trace for trace in pool.traces("one") if "session" in trace} - before
    assert made
    following = eve.begin("logs", "-f", "--tail", "1", "steady")
    assert following.stdout is not None
    assert following.stdout.readline() == "tick\n"
    pool.builder("token", "revoke", eve.token.split("_")[1])
    following.communicate(timeout=PATIENCE)
    until(lambda: admin.listed(session_id)["state"] == "ended", "the end of the session")
    assert "was revoked" in admin.listed(session_id)["reason"]
    until(lambda: not made & set(pool.traces("one")), "the end of everything of it at the node")
    asked = eve.docker("ps")
    assert asked.returncode == 1
    assert "was revoked" in asked.stderr, asked.stderr
    assert "was revoked" in eve.view()["reason"], eve.view()
    assert eve.offload("start").returncode == 4
    refused = eve.offload("stop")
    assert refused.returncode == 125
    assert "--force" in refused.stderr
    done = eve.offload("stop", "--force")
    assert done.returncode == 0, done.stderr
    assert (eve.names, eve.context) == ([], "")
    until(lambda: not eve.helpers(), "the end of the helper")
