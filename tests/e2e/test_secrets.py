"""Secrets reach the steps that ask for them, and nothing else ever sees them."""

from __future__ import annotations

import base64
import functools
import http.server
import os
import secrets
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.remotefiles import git_repository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member, Pool

SUM = "sha256sum /run/secrets/t > /sum"


def places_with(value: bytes, *roots: Path) -> list[str]:
    """Return all files below some directories that have a text, also in hexadecimal or base64."""
    needles = [value, value.hex().encode(), base64.b64encode(value).rstrip(b"=")[:-1]]
    found = []
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    content = path.read_bytes()
                    if any(needle in content for needle in needles):
                        found.append(str(path))
    return found


@pytest.fixture
def value() -> str:
    return f"value-{secrets.token_hex(24)}"


@pytest.fixture
def keeper(member: Member, tmp_path: Path, value: str) -> Iterator[Member]:
    """A member whose secret lies in a file and in a variable."""
    member.environment |= {"MY_TOKEN": value}
    (member.home / "token.txt").write_text(value)
    yield member
    del member.environment["MY_TOKEN"]


def context(folder: Path, *steps: str) -> Path:
    lines = "".join(f"RUN {step}\n" for step in steps)
    return make_context(folder, f"ARG RUN_ID=0\n{lines}FROM scratch\nCOPY --from=0 /sum /sum\n")


def test_secret_of_a_file_or_a_variable_reaches_the_step_and_stays_nowhere(
    pool: Pool, keeper: Member, tmp_path: Path, value: str
) -> None:
    folder = context(
        tmp_path / "c",
        f"--mount=type=secret,id=t,required=true test $RUN_ID && {SUM}",
        "--mount=type=secret,id=u,env=U,required=true printf %s \"$U\" | sha256sum >> /sum",
    )  # fmt: skip
    done = keeper.build(
        "--build-arg", f"RUN_ID={os.getpid()}", "--secret", "id=t,src=token.txt",
        "--secret", "id=u,env=MY_TOKEN", "-o", tmp_path / "out", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digest = subprocess.run(
        ["sha256sum"], input=value.encode(), capture_output=True, check=True
    ).stdout.split()[0]
    lines = (tmp_path / "out" / "sum").read_bytes().split()
    assert lines.count(digest) == 2
    assert value not in done.stderr + done.stdout
    newest = keeper.wait_published()
    log = keeper.offload("logs", newest["build_id"])
    assert log.returncode == 0 and value not in log.stdout + log.stderr
    (keeper.home / "token.txt").unlink()
    assert places_with(value.encode(), pool.data, keeper.home, tmp_path) == []


def test_value_of_a_secret_is_in_no_error_and_no_log_of_a_failed_build(
    pool: Pool, keeper: Member, tmp_path: Path, value: str
) -> None:
    folder = context(tmp_path / "c", "--mount=type=secret,id=t cat /run/secrets/none")
    done = keeper.build("--secret", "id=t,src=token.txt", folder, OFFLOAD_DEBUG="1")
    assert done.returncode == 1
    assert value not in done.stderr + done.stdout
    (keeper.home / "token.txt").unlink()
    assert places_with(value.encode(), pool.data, keeper.home, tmp_path) == []


def test_secret_that_was_not_given_fails_only_the_step_that_requires_it(
    member: Member, tmp_path: Path
) -> None:
    step = "--mount=type=secret,id=t{} test ! -e /run/secrets/t && echo $RUN_ID > /sum"
    run_id = f"RUN_ID={secrets.token_hex(4)}"
    folder = context(tmp_path / "a", step.format(""))
    done = member.build("--build-arg", run_id, "-o", tmp_path / "out", folder)
    assert done.returncode == 0, done.stderr
    folder = context(tmp_path / "b", step.format(",required=true"))
    done = member.build("--build-arg", run_id, folder)
    assert done.returncode == 1
    assert "secret t: not found" in done.stderr
    assert "Give --secret id=t,src=FILE" in done.stderr


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("id=t,src=missing.txt", "failed to stat missing.txt: no such file or directory"),
        ("id=t,src=large", "secret t too big. max size 500KiB"),
        ("src=x", "secret missing ID"),
        ("id=t,type=vault", 'unsupported secret type "vault"'),
        ("id=t,path=x", "unexpected key 'path' in 'path=x'"),
        ("id", "invalid field 'id' must be a key=value pair"),
    ],
)
def test_secret_that_cannot_be_had_is_refused_before_the_build(
    member: Member, tmp_path: Path, given: str, sentence: str
) -> None:
    (member.home / "large").write_bytes(b"x" * 512_001)
    done = member.build("--secret", given, make_context(tmp_path / "c"))
    assert done.returncode == 1
    assert sentence in done.stderr


class _Guarded(http.server.SimpleHTTPRequestHandler):
    """Gives files only to who knows the token, as git servers do."""

    token = ""

    def do_GET(self) -> None:
        login = base64.b64encode(f"x-access-token:{self.token}".encode()).decode()
        if self.headers.get("Authorization") != f"basic {login}":
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


def test_login_at_a_git_server_serves_context_and_cache_export_and_stays_nowhere(
    pool: Pool, keeper: Member, tmp_path: Path, value: str
) -> None:
    git_repository(
        tmp_path / "work", tmp_path / "served" / "repo.git",
        {"Dockerfile": "FROM scratch\nCOPY f /\n", "f": value[-5:]},
    )  # fmt: skip
    handler = type("Guarded", (_Guarded,), {"token": value})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "served"))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/repo.git"
            refused = keeper.build(url)
            done = keeper.build(
                "--secret", "id=GIT_AUTH_TOKEN,env=MY_TOKEN", "-o", tmp_path / "out", url
            )
            assert done.returncode == 0, done.stderr
            keeper.wait_published()
        finally:
            server.shutdown()
            thread.join()
    assert refused.returncode == 1
    assert (tmp_path / "out" / "f").read_text() == value[-5:]
    assert value not in done.stderr + done.stdout
    (keeper.home / "token.txt").unlink()
    assert places_with(value.encode(), pool.data, keeper.home, tmp_path) == []


def test_secret_comes_through_a_pipe_that_can_be_read_once(
    member: Member, tmp_path: Path, value: str
) -> None:
    folder = context(tmp_path / "c", f"--mount=type=secret,id=t test $RUN_ID && {SUM}")
    command = member.command(
        "offload-build", "--progress", "plain", "--build-arg", f"RUN_ID={value[-8:]}",
        "--secret", "id=t,src=/dev/fd/PIPE", "-o", tmp_path / "out", folder,
    )  # fmt: skip
    read, write = os.pipe()
    try:
        os.write(write, value.encode())
        os.close(write)
        command = [word.replace("PIPE", str(read)) for word in command]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=110, cwd=member.home,
            env=member.environment, pass_fds=(read,), check=False,
        )  # fmt: skip
    finally:
        os.close(read)
    assert done.returncode == 0, done.stderr
    digest = subprocess.run(
        ["sha256sum"], input=value.encode(), capture_output=True, check=True
    ).stdout.split()[0]
    assert digest in (tmp_path / "out" / "sum").read_bytes()
