"""The plan of the user's own docker buildx, which knows every form of bake files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.bake.plan import read_plan
from offload_client.dockerconfig import config_directory, read_docker_config
from offload_core.errors import BakeError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from offload_client.bake.plan import BakePlan
    from offload_client.bake.request import BakeRequest
    from offload_client.invocation import Invocation

PLUGIN = "docker-buildx"
SYSTEM_DIRECTORIES = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)
"""Source: docker CLI, cli-plugins/manager/manager_unix.go."""
VARIABLE = "OFFLOAD_BUILDX"
"""Names the program; "none" uses none."""
PRINT_SECONDS = 60.0
STALE_PROGRESS = "#"


def find_buildx(environment: Mapping[str, str]) -> Path | None:
    """Return the user's buildx: OFFLOAD_BUILDX, docker's plugin directories, PATH.

    Raises:
        BakeError: OFFLOAD_BUILDX names no program.
    """
    named = environment.get(VARIABLE, "")
    if named == "none":
        return None
    if named:
        found = shutil.which(named, path=environment.get("PATH"))
        if found is None:
            raise BakeError(f"{VARIABLE} names {named}, which is not a program")
        return Path(found)
    for folder in plugin_directories(environment):
        path = Path(folder) / PLUGIN
        if path.is_file() and os.access(path, os.X_OK):
            return path
    for name in (PLUGIN, "buildx"):
        if found := shutil.which(name, path=environment.get("PATH")):
            return Path(found)
    return None


def plugin_directories(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield where docker's CLI looks for plugins, in its order."""
    extra: object = None
    try:
        extra = read_docker_config(environment).get("cliPluginsExtraDirs")
    except OffloadError:
        # docker itself complains about its configuration.
        extra = None
    if isinstance(extra, list):
        yield from (item for item in extra if isinstance(item, str))
    yield str(config_directory(environment) / "cli-plugins")
    yield from SYSTEM_DIRECTORIES


def buildx_plan(invocation: Invocation, buildx: Path, request: BakeRequest) -> BakePlan:
    """Have buildx read the files; blocking.

    Raises:
        BakeError: it refuses them, in its own words, or cannot be run.
    """
    return read_plan(_run(invocation, buildx, [*_arguments(request), "--print"], request.targets))


def buildx_list(invocation: Invocation, buildx: Path, request: BakeRequest) -> str:
    """Return what `--list` shows; blocking.

    Raises:
        BakeError: as `buildx_plan`.
    """
    return _run(invocation, buildx, [*_arguments(request), "--list", request.listed], ())


def _arguments(request: BakeRequest) -> list[str]:
    arguments = [f"--file={name}" for name in request.files]
    arguments += [f"--set={text}" for text in request.overrides]
    arguments += [f"--allow={text}" for text in request.allow]
    for name, value in (
        ("provenance", request.provenance),
        ("sbom", request.sbom),
        ("call", request.call),
    ):
        if value:
            arguments.append(f"--{name}={value}")
    for name, switch in (
        ("load", request.load or None),
        ("push", request.push or None),
        ("no-cache", request.no_cache),
        ("pull", request.pull),
    ):
        if switch is not None:
            arguments.append(f"--{name}={str(switch).lower()}")
    return arguments


def _run(invocation: Invocation, buildx: Path, arguments: list[str], targets: Sequence[str]) -> str:
    # quiet: the only progress would be that of reading the files.
    command = [str(buildx), "bake", *arguments, "--progress=quiet", "--", *targets]
    try:
        done = subprocess.run(
            command,
            cwd=invocation.cwd,
            env=dict(invocation.environment),
            stdin=invocation.stdin,
            capture_output=True,
            timeout=PRINT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BakeError(
            f"cannot run {buildx}: {error}", hint=f"set {VARIABLE}=none to do without it"
        ) from error
    if done.returncode:
        raise BakeError(_complaint(done.stderr.decode("utf-8", "replace"), buildx))
    return done.stdout.decode("utf-8", "replace")


def _complaint(text: str, buildx: Path) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith(STALE_PROGRESS)]
    said = "\n".join(lines).replace("ERROR: ", "", 1).strip()
    return said or f"{buildx} could not read the bake files"
