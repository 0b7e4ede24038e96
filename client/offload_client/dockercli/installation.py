"""`offload install` and `offload uninstall`: our plugin in docker's CLI, and `docker build` by it.

What was there before is written down, so that uninstalling brings it back.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.build.outputfiles import replace_file
from offload_client.dockercli.configfile import DockerConfigFile
from offload_client.dockerconfig import config_directory
from offload_core.errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.invocation import Invocation

PLUGIN = "offload"
PROGRAM = "docker-offload"
STATE_FILE = "docker-install.json"


@dataclass(frozen=True)
class Before:
    """What `offload install` has found.

    Attributes:
        builder: the alias; None for none.
        had_aliases: there was a place for aliases.
        had_config: docker's config.json was there.
        plugin: what the plugin's file was a link to; None when there was no such file.
        made: directories that were made, outermost first.
    """

    builder: str | None
    had_aliases: bool
    had_config: bool
    plugin: str | None
    made: Sequence[str] = ()


class Installation:
    """Our part of one user's docker CLI."""

    def __init__(self, invocation: Invocation) -> None:
        """Look at the user's docker configuration.

        Raises:
            ConfigError: it cannot be read.
        """
        folder = config_directory(invocation.environment)
        self._folder = folder
        self._link = folder / "cli-plugins" / PROGRAM
        self._state = invocation.config_dir() / STATE_FILE
        self._config = DockerConfigFile(folder / "config.json")

    @property
    def config_path(self) -> Path:
        """Docker's config.json."""
        return self._config.path

    @property
    def link(self) -> Path:
        """The plugin's file."""
        return self._link

    def install(self, *, force: bool) -> None:
        """Make `docker build` use the pool.

        Args:
            force: also in the place of somebody else's alias or plugin.

        Raises:
            InvalidValueError: there is one.
            ConfigError: a file cannot be written.
        """
        program = plugin_program()
        builder, plugin = self._config.builder, self._link_target()
        if not force:
            self._check_free(builder, plugin, program)
        before = self._read_state()
        if before is None:
            before = Before(
                builder=None if builder == PLUGIN else builder,
                had_aliases=self._config.has_aliases,
                had_config=self._config.existed,
                plugin=None if plugin == str(program) else plugin,
                made=self._missing_directories(),
            )
        self._write_state(before)
        self._place_link(str(program))
        self._config.set_builder(PLUGIN)
        self._config.save()

    def _check_free(self, builder: str | None, plugin: str | None, program: Path) -> None:
        if builder not in (None, PLUGIN):
            raise InvalidValueError(
                f'{self._config.path} has the alias "builder" for the plugin "{builder}" already',
                hint="take its place with --force; uninstalling brings it back",
            )
        if plugin is not None and not _is_ours(plugin, program):
            raise InvalidValueError(
                f"{self._link} is somebody else's plugin",
                hint="take its place with --force; uninstalling brings it back",
            )

    def uninstall(self) -> bool:
        """Bring back what was there before; return whether there was anything of ours.

        An alias or plugin that somebody else has put in our place stays.

        Raises:
            ConfigError: a file cannot be written.
        """
        before = self._read_state()
        ours = self._remove_link(before)
        if self._config.builder == PLUGIN:
            ours = True
            self._restore_alias(before)
        for name in reversed(before.made if before is not None else ()):
            # Only those that hold nothing else by now.
            try:
                Path(name).rmdir()
            except OSError:
                break
        self._state.unlink(missing_ok=True)
        return ours

    def _restore_alias(self, before: Before | None) -> None:
        if before is not None and before.builder is not None:
            self._config.set_builder(before.builder)
            self._config.save()
            return
        self._config.drop_builder(keep_aliases=before is not None and before.had_aliases)
        if before is not None and not before.had_config and not self._config.content:
            self._config.remove()
            return
        self._config.save()

    def _remove_link(self, before: Before | None) -> bool:
        target = self._link_target()
        if target is None or not _is_ours(target, plugin_program()):
            return False
        try:
            self._link.unlink(missing_ok=True)
            if before is not None and before.plugin is not None:
                self._link.symlink_to(before.plugin)
        except OSError as error:
            raise ConfigError(f"cannot change {self._link}: {error.strerror}") from error
        return True

    def _link_target(self) -> str | None:
        """Return what the plugin's file leads to; its own path when it is no link."""
        if self._link.is_symlink():
            return str(self._link.readlink())
        return str(self._link) if self._link.exists() else None

    def _place_link(self, program: str) -> None:
        scratch = self._link.with_name(f".{PROGRAM}.{os.getpid()}")
        try:
            self._link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._link.exists() and not self._link.is_symlink():
                raise ConfigError(
                    f"{self._link} is a file and no link; move it away, then install again"
                )
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(program)
            scratch.replace(self._link)
        except OSError as error:
            raise ConfigError(f"cannot write {self._link}: {error.strerror}") from error

    def _missing_directories(self) -> list[str]:
        return [str(folder) for folder in (self._folder, self._link.parent) if not folder.exists()]

    def _read_state(self) -> Before | None:
        try:
            values = json.loads(self._state.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            # What cannot be read helps nobody; the alias and the link are found without it.
            return None
        known = {field.name for field in fields(Before)}
        if not isinstance(values, dict) or set(values) != known:
            return None
        return Before(**values)

    def _write_state(self, before: Before) -> None:
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot write {self._state}: {error.strerror}") from error
        replace_file(self._state, json.dumps(asdict(before), indent=2))


def plugin_program() -> Path:
    """Return our plugin's program, beside the command that runs.

    Raises:
        ConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name(PROGRAM)
    if beside.is_file():
        return beside
    found = shutil.which(PROGRAM)
    if found is None:
        raise ConfigError(f"the program {PROGRAM} is missing; install offload-build again")
    return Path(found)


def _is_ours(target: str, program: Path) -> bool:
    # Also of another virtual environment of the same user, which is ours as well.
    if target == str(program):
        return True
    try:
        text = Path(target).read_bytes()[:4096]
    except OSError:
        # A link that leads nowhere is nobody's any more.
        return True
    return b"offload_client.cli.entry" in text
