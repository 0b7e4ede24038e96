"""buildx's own files about its builders, for machines where buildx is not installed (yet).

Source: buildx, store/store.go and store/nodegroup.go. `instances/NAME` has a builder, `current`
the chosen one for a docker endpoint, `activity/NAME` when it was used last. Writers hold a lock on
`.lock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_client.dockerconfig import config_directory, read_docker_config
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LOCK_SECONDS = 10.0
_POLL_SECONDS = 0.05
DEFAULT_ENDPOINT = "unix:///var/run/docker.sock"
NODE_ID_FILE = ".buildNodeID"


class BuildxStore:
    """The builders that a user's buildx knows.

    Args:
        environment: of the command; BUILDX_CONFIG, else a directory beside docker's config.json.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        named = environment.get("BUILDX_CONFIG")
        self.folder = Path(named) if named else config_directory(environment) / "buildx"
        self._environment = environment

    def find(self, name: str) -> dict[str, Any] | None:
        """Return a builder as buildx has it, None when it knows none of this name.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = self.folder / "instances" / name
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        return found if isinstance(found, dict) else {}

    def options(self, name: str) -> dict[str, str]:
        """Return the driver's options of a builder's first node; empty when there are none."""
        nodes = (self.find(name) or {}).get("Nodes") or [{}]
        return dict(nodes[0].get("DriverOpts") or {})

    def current(self) -> str:
        """Return the name of the chosen builder, empty when none is."""
        try:
            told = json.loads((self.folder / "current").read_bytes())
        except (OSError, ValueError):
            return ""
        if not isinstance(told, dict) or not (
            told.get("Global") or told.get("Key") == self._endpoint()
        ):
            return ""
        return str(told.get("Name") or "")

    def choice(self) -> str | None:
        """Return buildx's file about the chosen builder as it is, None when there is none."""
        try:
            return (self.folder / "current").read_text("utf-8")
        except (OSError, ValueError):
            return None

    def chosen_anywhere(self) -> str:
        """Return the name of the chosen builder, also when it is for another docker endpoint."""
        try:
            told = json.loads(self.choice() or "{}")
        except ValueError:
            return ""
        return str(told.get("Name") or "") if isinstance(told, dict) else ""

    def save(
        self,
        name: str,
        *,
        endpoint: str,
        options: Mapping[str, str],
        platforms: Sequence[str] = (),
        node: str = "",
    ) -> None:
        """Write a builder with the driver `remote` that has one node.

        Raises:
            ConfigError: it cannot be written.
        """
        place = {
            "Name": node or f"{name}0",
            "Endpoint": endpoint,
            "Platforms": [_platform(text) for text in platforms] or None,
            "DriverOpts": dict(options) or None,
            "Flags": None,
            "Files": None,
        }
        group = {"Name": name, "Driver": "remote", "Nodes": [place], "Dynamic": False}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._locked():
            self._write(f"activity/{name}", now)
            self._write(f"instances/{name}", json.dumps(group, separators=(",", ":")))

    def choose(self, name: str, *, everywhere: bool = False) -> None:
        """Make a builder the one that commands use.

        Args:
            name: of the builder.
            everywhere: for all docker endpoints, not only the one of this command.

        Raises:
            ConfigError: it cannot be written.
        """
        told = {"Key": self._endpoint(), "Name": name, "Global": everywhere}
        self.put_back(json.dumps(told, separators=(",", ":")))

    def put_back(self, choice: str | None) -> None:
        """Make a former choice count again; None for none.

        Raises:
            ConfigError: it cannot be written.
        """
        with self._locked():
            if choice is not None:
                self._write("current", choice)
                return
            try:
                (self.folder / "current").unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot remove {self.folder / 'current'}: {error.strerror}"
                ) from error

    def tidy(self) -> None:
        """Remove buildx's directory when nothing is in it but what every writer makes."""
        with contextlib.suppress(OSError):
            for name in ("instances", "defaults", "activity"):
                (self.folder / name).rmdir()
            if [path.name for path in self.folder.iterdir()] == [".lock"]:
                (self.folder / ".lock").unlink()
                self.folder.rmdir()

    def remove(self, name: str) -> None:
        """Make buildx forget a builder.

        Raises:
            ConfigError: it cannot be written.
        """
        with self._locked():
            for folder in ("instances", "activity"):
                try:
                    (self.folder / folder / name).unlink(missing_ok=True)
                except OSError as error:
                    raise ConfigError(
                        f"cannot remove {self.folder / folder / name}: {error.strerror}"
                    ) from error

    def node_id(self) -> str:
        """Return what buildx calls this machine, empty when it has no name yet.

        BuildKit recognises files that it has received before by it.
        """
        try:
            return (self.folder / NODE_ID_FILE).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def adopt(self, node_id: str) -> None:
        """Give this machine the name that another store has for it.

        Raises:
            ConfigError: it cannot be written.
        """
        with self._locked():
            self._write(NODE_ID_FILE, node_id)

    def _endpoint(self) -> str:
        """Return under which docker endpoint the choice is kept.

        Source: buildx, util/dockerutil/context.go, and docker CLI, cli/command/cli.go.
        """
        host = self._environment.get("DOCKER_HOST", "")
        if not host:
            context = self._environment.get("DOCKER_CONTEXT", "")
            if not context:
                context = str(read_docker_config(self._environment).get("currentContext") or "")
            if context not in ("", "default"):
                return context
        return host or DEFAULT_ENDPOINT

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            file = os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(file, "w", encoding="utf-8") as stream:  # noqa: PTH123 - mode from the start
                stream.write(text)
            scratch.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            for name in ("", "instances", "defaults", "activity"):
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {self.folder}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(
                            f"another command holds {self.folder / '.lock'}; end it and try again"
                        ) from None
                    time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(file)


def _platform(text: str) -> dict[str, str]:
    """Return a platform as the OCI image specification writes it."""
    system, _, rest = text.partition("/")
    architecture, _, variant = rest.partition("/")
    told = {"architecture": architecture, "os": system}
    return told | {"variant": variant} if variant else told
