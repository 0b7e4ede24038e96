"""Docker contexts for sessions: written as docker's CLI writes them, chosen and given back.

Source: docker CLI, cli/context/store (metadatastore.go: `contexts/meta/ID/meta.json` below docker's
configuration directory, ID being the SHA-256 of the name; TLS files stand in `contexts/tls/ID`,
which a unix socket does not need) and docs "Docker contexts".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.dockercli.configfile import DockerConfigFile
from offload_client.dockerconfig import config_directory
from offload_core.errors import ConfigError, InvalidValueError
from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DESCRIPTION = "Docker engine of a session on the pool"
HOST_VARIABLE, CONTEXT_VARIABLE = "DOCKER_HOST", "DOCKER_CONTEXT"
SOCKET_NAME = "engine.sock"
DEFAULT = "default"
"""Docker's own context, which has no files."""
MAX_META_BYTES = 1 << 20
DIRECTORY_MODE, FILE_MODE = 0o755, 0o644
"""Those that docker's CLI uses."""


@dataclass(frozen=True)
class Overriding:
    """Something in the environment that docker's CLI obeys more than the chosen context.

    Attributes:
        variable: its name.
        value: what it says.
    """

    variable: str
    value: str


class DockerContexts:
    """The docker contexts of one user. Everything here blocks for a few small files."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Look at docker's configuration directory, DOCKER_CONFIG or ~/.docker."""
        self._environment = environment
        self._folder = config_directory(environment)

    def overriding(self, name: str) -> Overriding | None:
        """Return what keeps docker from using a context although it is the chosen one."""
        if value := self._environment.get(HOST_VARIABLE):
            return Overriding(HOST_VARIABLE, value)
        value = self._environment.get(CONTEXT_VARIABLE, "")
        return Overriding(CONTEXT_VARIABLE, value) if value and value != name else None

    def host(self, name: str) -> str | None:
        """Return the address of a context's engine; None when there is no such context.

        Raises:
            ConfigError: its file cannot be read.
        """
        path = self._meta_file(name)
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(MAX_META_BYTES))
            return str(found["Endpoints"]["docker"]["Host"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            return ""

    def write(self, name: str, socket: Path) -> None:
        """Make or replace the context of a session.

        Raises:
            InvalidValueError: somebody else has a context of this name.
            ConfigError: it cannot be written.
        """
        self.check_free(name, socket)
        path = self._meta_file(name)
        document = {
            "Name": name,
            "Metadata": {"Description": DESCRIPTION},
            "Endpoints": {"docker": {"Host": f"unix://{socket}", "SkipTLSVerify": False}},
        }
        data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        try:
            path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            replace_small_file(path, data)
            path.chmod(FILE_MODE)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def check_free(self, name: str, socket: Path) -> None:
        """Refuse a name under which there is a context that no session of ours has made.

        Raises:
            InvalidValueError: there is one.
            ConfigError: it cannot be read.
        """
        host = self.host(name)
        if host is None or host == f"unix://{socket}" or host.endswith(f"/{SOCKET_NAME}"):
            # Also what a session of another configuration directory has left.
            return
        raise InvalidValueError(
            f'there is a docker context "{name}" that is not of a session',
            hint=f"remove it with 'docker context rm {name}', or give the session another name",
        )

    def remove(self, name: str, socket: Path) -> bool:
        """Remove the context of a session; return whether there was one.

        A context of this name that leads elsewhere by now stays.

        Raises:
            ConfigError: it cannot be removed.
        """
        if self.host(name) != f"unix://{socket}":
            return False
        path = self._meta_file(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot remove {path}: {error.strerror}") from error
        with contextlib.suppress(OSError):
            # Somebody may keep other things of the context in it.
            path.parent.rmdir()
        return True

    def current(self) -> str:
        """Return the chosen context; empty for docker's default one.

        Raises:
            ConfigError: docker's configuration cannot be read.
        """
        return self._config().current_context

    def select(self, name: str) -> str:
        """Choose a context, empty for docker's default one; return the former choice.

        Raises:
            ConfigError: docker's configuration cannot be read or written.
        """
        config = self._config()
        former = config.current_context
        if former != name:
            config.set_current_context(name)
            config.save()
        return former

    def restore(self, name: str, former: str) -> str | None:
        """Give the choice back that was there before `name`, if `name` is still chosen.

        Returns:
            The context that is chosen now, empty for docker's default one; None when nothing was
            to be done. A former context that is gone gives way to the default one.

        Raises:
            ConfigError: docker's configuration cannot be read or written.
        """
        if self.current() != name:
            return None
        kept = former == DEFAULT or (former != name and former and self.host(former) is not None)
        target = former if kept else ""
        self.select(target)
        return target

    def _config(self) -> DockerConfigFile:
        return DockerConfigFile(self._folder / "config.json")

    def _meta_file(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / "contexts" / "meta" / digest / "meta.json"
