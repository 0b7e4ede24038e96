"""Private registries through the command: sentences, exit codes, credential helpers."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.tokenserver import IDENTITY, TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member, Pool


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with TokenServer(tmp_path_factory.mktemp("tokens")) as server:
        yield server


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer
) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry"), auth=tokens.auth) as running:
        yield running


def write_helper(member: Member, host: str, script: str) -> dict[str, str]:
    """Give a member a credential helper for a registry; return the environment with it."""
    folder = member.home / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "docker-credential-mine").write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    (folder / "docker-credential-mine").chmod(0o755)
    (member.home / ".docker").mkdir(exist_ok=True)
    config = {"credHelpers": {host: "mine"}}
    (member.home / ".docker" / "config.json").write_text(json.dumps(config))
    return {"PATH": f"{folder}:{member.environment['PATH']}"}


def test_identity_token_of_a_helper_pushes(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    answer = json.dumps({"ServerURL": "x", "Username": "<token>", "Secret": IDENTITY})
    environment = write_helper(member, registry.address, f"echo '{answer}'")
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:1", "--push", context, **environment)
    assert result.returncode == 0, result.stderr
    assert IDENTITY not in result.stderr


def test_helper_that_fails_is_named_and_the_exit_code_is_that_of_a_missing_login(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    environment = write_helper(member, registry.address, "echo the vault is sealed; exit 1")
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:2", "--push", context, **environment)
    assert result.returncode == 8, result.stderr
    assert "the vault is sealed" in result.stderr
    assert "docker-credential-mine" in result.stderr
    last = result.stderr.rstrip().splitlines()[-1]
    assert "needs a login and there is none: use `docker login" in last
    assert "Traceback" not in result.stderr


def test_helper_that_hangs_is_named_within_two_seconds(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    environment = write_helper(member, registry.address, "exec sleep 60")
    # The build is at work meanwhile: the helper was asked when it began.
    context = make_context(tmp_path / "c", "RUN sleep 20\n")
    process = subprocess.Popen(
        member.command(
            "offload-build", "--progress", "plain", "-t", f"{registry.address}/team/app:3",
            "--push", context,
        ),
        stderr=subprocess.PIPE, text=True, env={**member.environment, **environment},
    )  # fmt: skip
    assert process.stderr is not None
    began = None
    try:
        for line in process.stderr:
            if began is None and "[1/" in line:
                began = time.monotonic()
            if "docker-credential-mine" in line:
                break
        else:
            raise AssertionError("nothing was said of the helper")
        assert began is None or time.monotonic() - began < 2.5
        assert "unlock a keychain" in line
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(20)


def test_wrong_password_ends_with_what_to_do(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    registry.write_login(member.home, password="not the password")
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:4", "--push", context)
    assert result.returncode == 8
    assert (
        f"{registry.address} refused your login as {USER} for team/app: log in again with"
        f" `docker login {registry.address}`"
    ) in result.stderr
    assert "not the password" not in result.stderr
    assert PASSWORD not in result.stderr
