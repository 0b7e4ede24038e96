"""The way that docker's command line has by itself: `docker -H ssh://`, to an sshd on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError
from tests.fixtures.sshparts import git_over_ssh, new_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = """Host *
  IdentityFile {key}
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ControlMaster auto
  ControlPath {folder}/c
  ControlPersist 600
"""


@contextlib.contextmanager
def over_ssh(folder: Path, engine: str, environment: dict[str, str]) -> Iterator[str]:
    """Run an sshd; give the address for docker, of an engine's socket `unix://PATH`.

    `environment` gets a PATH with an ssh that has a configuration of its own, and keeps the
    connection open for the next command, as who uses this for work has it.
    """
    folder.mkdir(parents=True)
    key = new_key(folder / "key")
    config = folder / "config"
    config.write_text(CONFIG.format(key=key, folder=folder))
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    program.chmod(0o755)
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    with git_over_ssh(key) as port:
        address = f"ssh://root@127.0.0.1:{port}{engine.removeprefix('unix://')}"
        done = subprocess.run(
            ["docker", "-H", address, "version", "-f", "{{.Server.Version}}"],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchmarkError(f"docker does not reach {address}: {done.stderr}")
        try:
            yield address
        finally:
            subprocess.run(
                [program, "-O", "exit", "-p", str(port), "root@127.0.0.1"],
                env=os.environ, capture_output=True, timeout=20, check=False,
            )  # fmt: skip
