"""The tools that people use today: `docker buildx` with the remote driver, and `buildctl`."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING

from benchmarks.commands import Finished, Place, run
from benchmarks.daemons import TOOLS, tool_environment
from benchmarks.model import BenchmarkError
from benchmarks.terminal import run_on_terminal

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.buildkitport import TlsFiles
    from benchmarks.terminal import Reader

# Our builds make a provenance attestation for pushed images only; leaving it out makes both do the
# same work.
SAME_WORK = ("--provenance=false",)


class Buildx:
    """A user of `docker buildx` with a configuration of their own.

    Args:
        home: for it.
        place: where the commands run.
    """

    def __init__(self, home: Path, place: Place = nullcontext) -> None:
        docker = shutil.which("docker")
        if docker is None:
            raise BenchmarkError("the docker command line is not installed; run 'make tools'")
        self._docker = docker
        self._home = home
        self._place = place
        self.docker_config = home / "docker"
        plugins = self.docker_config / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-buildx").symlink_to(TOOLS / "buildx")
        self._environment = tool_environment(home, DOCKER_CONFIG=str(self.docker_config))

    def create(self, builder: str, address: str, tls: TlsFiles | None = None) -> None:
        """Make a builder for a BuildKit at unix://PATH, or with TLS at tcp://HOST:PORT."""
        options = [] if tls is None else ["--driver-opt", tls.driver_options]
        self._run("create", "--name", builder, "--driver", "remote", *options, address)

    def build(
        self,
        builder: str,
        context: Path,
        *arguments: str,
        docker_host: str = "",
        tolerated: str = "",
    ) -> Finished:
        """Run `docker buildx build`; see `commands.run` for `tolerated`."""
        more = {"DOCKER_HOST": docker_host} if docker_host else {}
        return self._run(
            *("build", "--builder", builder, *SAME_WORK, *arguments, str(context)),
            tolerated=tolerated,
            **more,
        )

    def build_on_terminal(
        self,
        builder: str,
        context: Path,
        *arguments: str,
        reader: Reader,
        tolerated: str = "",
    ) -> Finished:
        """Run `docker buildx build` on a terminal; see `commands.run` for `tolerated`."""
        return run_on_terminal(
            [self._docker, "buildx", "build", "--builder", builder, *SAME_WORK, *arguments,
             str(context)],
            environment=self._environment,
            folder=self._home,
            reader=reader,
            place=self._place,
            tolerated=tolerated,
        )  # fmt: skip

    def help(self) -> Finished:
        """Run `docker buildx build --help`."""
        return self._run("build", "--help")

    def _run(self, *arguments: str, tolerated: str = "", **environment: str) -> Finished:
        return run(
            [self._docker, "buildx", *arguments],
            environment=self._environment | environment,
            folder=self._home,
            place=self._place,
            tolerated=tolerated,
        )


def buildctl(
    home: Path,
    address: str,
    context: Path,
    *arguments: str,
    tls: TlsFiles | None = None,
    flags: tuple[str, ...] = (),
    place: Place = nullcontext,
) -> Finished:
    """Run `buildctl build` of a Dockerfile; `flags` are those before "build"."""
    return run(
        [TOOLS / "buildctl", "--addr", address, *(tls.flags if tls else ()), *flags, "build",
         "--frontend", "dockerfile.v0", "--local", f"context={context}",
         "--local", f"dockerfile={context}", "--progress", "plain", *arguments],
        environment=tool_environment(home),
        folder=home,
        place=place,
    )  # fmt: skip
