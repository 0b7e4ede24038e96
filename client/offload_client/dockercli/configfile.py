"""Changing docker's config.json without touching anything else in it."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIASES = "aliases"
CURRENT_CONTEXT = "currentContext"
"""The context that docker's CLI uses. Source: docker CLI, cli/config/configfile/file.go."""
BUILDER = "builder"
"""The alias that docker's CLI asks for before `docker build`.

Source: docker CLI, cmd/docker/builder.go.
"""
DOCKER_INDENT = "\t"
NEW_MODE = 0o600


class DockerConfigFile:
    """Docker's config.json as it was read; written back with the same order and indentation."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Args:
            path: of the file, which need not exist; a symbolic link stays one.

        Raises:
            ConfigError: it cannot be read or is no JSON object.
        """
        self.path = path
        self._real = Path(os.path.realpath(path))
        self.existed = True
        text = "{}"
        try:
            text = self._real.read_text("utf-8")
        except FileNotFoundError:
            self.existed = False
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        try:
            content = json.loads(text or "{}")
        except ValueError:
            # Without "from": the decoder's error carries the whole document, with its logins.
            raise ConfigError(f"{path} is not valid JSON; repair or remove it") from None
        if not isinstance(content, dict) or not isinstance(content.get(ALIASES, {}), dict):
            raise ConfigError(f"{path} has another form than docker's; repair or remove it")
        self._content: dict[str, Any] = content
        indent = re.search(r"^([ \t]+)\S", text, re.MULTILINE)
        self._indent: str | None = indent[1] if indent else None
        if not self.existed or text.strip() in ("", "{}"):
            self._indent = DOCKER_INDENT
        self._end = "\n" if text.endswith("\n") else ""

    @property
    def content(self) -> Mapping[str, Any]:
        """The whole document."""
        return self._content

    @property
    def has_aliases(self) -> bool:
        """There is a place for aliases, be it empty."""
        return ALIASES in self._content

    @property
    def builder(self) -> str | None:
        """The plugin that `docker build` uses; None for docker's own choice."""
        found = self._content.get(ALIASES, {}).get(BUILDER)
        return None if found is None else str(found)

    def set_builder(self, plugin: str) -> None:
        """Choose the plugin that `docker build` uses."""
        self._content.setdefault(ALIASES, {})[BUILDER] = plugin

    def drop_builder(self, *, keep_aliases: bool) -> None:
        """Give the choice back to docker.

        Args:
            keep_aliases: leave the place for aliases, also an empty one.
        """
        aliases = self._content.get(ALIASES, {})
        aliases.pop(BUILDER, None)
        if not aliases and not keep_aliases:
            self._content.pop(ALIASES, None)

    @property
    def current_context(self) -> str:
        """The context that docker uses; empty for its default one."""
        found = self._content.get(CURRENT_CONTEXT)
        return found if isinstance(found, str) else ""

    def set_current_context(self, name: str) -> None:
        """Choose the context that docker uses; empty for its default one."""
        if name:
            self._content[CURRENT_CONTEXT] = name
        else:
            self._content.pop(CURRENT_CONTEXT, None)

    def save(self) -> None:
        """Replace the file at once, with its mode and owner.

        Raises:
            ConfigError: it cannot be written.
        """
        separators = None if self._indent is not None else (",", ":")
        text = json.dumps(
            self._content, indent=self._indent, ensure_ascii=False, separators=separators
        )
        scratch = ""
        try:
            self._real.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file, scratch = tempfile.mkstemp(prefix=".config-", dir=self._real.parent)
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                stream.write(text + self._end)
                stream.flush()
                os.fsync(stream.fileno())
            mode = NEW_MODE
            if self.existed:
                status = self._real.stat()
                mode = stat.S_IMODE(status.st_mode)
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(scratch, status.st_uid, status.st_gid)
            Path(scratch).chmod(mode)
            Path(scratch).replace(self._real)
        except OSError as error:
            if scratch:
                with suppress(OSError):
                    Path(scratch).unlink(missing_ok=True)
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the file.

        Raises:
            ConfigError: it cannot be removed.
        """
        try:
            self._real.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot remove {self.path}: {error.strerror}") from error
