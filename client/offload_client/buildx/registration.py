"""Telling buildx about a builder: by its own commands where it is installed, else by its files."""

from __future__ import annotations

import shutil
import subprocess
from functools import cached_property
from typing import TYPE_CHECKING

from offload_client.buildx.builders import builders_folder, driver_options
from offload_client.buildx.store import BuildxStore
from offload_core.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.buildx.builders import Builder
    from offload_client.invocation import Invocation

COMMAND_SECONDS = 30.0


class Registration:
    """What one user's buildx knows of our builders."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self.store = BuildxStore(invocation.environment)

    @cached_property
    def program(self) -> Sequence[str]:
        """The words that run buildx; none when it is not installed."""
        path = self._invocation.environment.get("PATH", "")
        for name, words in (("docker", ["buildx"]), ("docker-buildx", []), ("buildx", [])):
            found = shutil.which(name, path=path)
            if found is not None and self._call([found, *words, "version"]).returncode == 0:
                return [found, *words]
        return []

    def is_ours(self, name: str) -> bool:
        """Return whether buildx knows a builder of this name that uses our certificates."""
        certificate = self.store.options(name).get("cert", "")
        return certificate.startswith(f"{builders_folder(self._invocation)}/")

    def is_foreign(self, name: str) -> bool:
        """Return whether buildx has a builder of this name that is not ours."""
        return self.store.find(name) is not None and not self.is_ours(name)

    def check(self, name: str) -> None:
        """Refuse a name that buildx has for a builder that is not ours.

        Raises:
            UsageError: it has.
        """
        if self.is_foreign(name):
            raise UsageError(
                f'buildx has a builder "{name}" that is not ours',
                hint=f"choose another name, or remove it: docker buildx rm {name}",
            )

    def add(self, builder: Builder, *, use: bool) -> None:
        """Make buildx know a builder.

        Args:
            builder: whose certificate files are there.
            use: also choose it.

        Raises:
            UsageError: buildx has another builder of this name.
            ConfigError: buildx refuses it.
        """
        name = builder.name
        self.check(name)
        self.remove(name)
        options = driver_options(self._invocation, builder)
        if not self.program:
            self.store.save(
                name, endpoint=builder.endpoint, options=options,
                platforms=builder.platforms, node=builder.node,
            )  # fmt: skip
            if use:
                self.store.choose(name)
            return
        arguments = ["create", "--name", name, "--driver", "remote"]
        for option, value in options.items():
            arguments += ["--driver-opt", _csv(f"{option}={value}")]
        if builder.platforms:
            arguments += ["--platform", ",".join(builder.platforms)]
        if builder.node:
            arguments += ["--node", builder.node]
        self._run([*arguments, *(["--use"] if use else []), builder.endpoint])

    def remove(self, name: str) -> bool:
        """Make buildx forget a builder of ours; return whether it knew it.

        Raises:
            ConfigError: buildx refuses to.
        """
        if not self.is_ours(name):
            return False
        if self.program:
            self._run(["rm", "--force", name])
        else:
            self.store.remove(name)
        return True

    def _run(self, arguments: Sequence[str]) -> None:
        done = self._call([*self.program, *arguments])
        if done.returncode:
            text = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
            raise ConfigError(f"docker buildx {arguments[0]}: {text.removeprefix('ERROR: ')}")

    def _call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False,
                stdin=subprocess.DEVNULL, timeout=COMMAND_SECONDS, cwd=self._invocation.cwd,
                env=dict(self._invocation.environment),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 126, "", str(error))


def _csv(text: str) -> str:
    """Return one value for a flag that is read as CSV (RFC 4180)."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\n') else text
