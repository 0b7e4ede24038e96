"""What this machine knows of its sessions: a directory for each, with a record and sockets.

`sessions/NAME/` below the state directory has `session.json`, the sockets `engine.sock` (for docker
clients) and `helper.sock` (for our commands), and `helper.log`. The record is there for as long as
the session is of use here; the helper ends when it goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError, InvalidValueError, NotFoundError
from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from offload_client.invocation import Invocation

DEFAULT_NAME = "default"
RECORD_FILE = "session.json"
LOG_FILE = "helper.log"
END_FILE = "ended"
"""Why the session has ended, once it has."""
_MAX_END_BYTES = 1000
LOCK_FILE = "helper.lock"
"""Locked for as long as the helper lives."""
_CONTEXT = "docker-offload"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_MAX_SOCKET_BYTES = 100
"""sun_path has 108 bytes (unix(7)); a suffix is added while a socket is made."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session that this machine uses.

    Attributes:
        session_id: at the gateway.
        name: of the directory.
        project_id: whose it is.
        gateway: HOST:PORT.
        context: docker context that leads to it; empty without one.
        created: seconds since 1970 UTC.
        former_context: docker context that was in use before; empty for docker's default one.
        owner: member whose session it is.
        mine: the owner is the member who uses this machine.
        node_id: of its node.
        gpu: it was given one.
        started: when its engine answered first, in seconds since 1970 UTC.
    """

    session_id: str
    name: str
    project_id: str
    gateway: str
    context: str
    created: float
    former_context: str = ""
    owner: str = ""
    mine: bool = True
    node_id: str = ""
    gpu: bool = False
    started: float = 0.0


def context_name(name: str) -> str:
    """Return the docker context of a session."""
    return _CONTEXT if name == DEFAULT_NAME else f"{_CONTEXT}-{name}"


def sessions_directory(invocation: Invocation) -> Path:
    """Return where the directories of all sessions are."""
    # Docker and the helper are not where this command is.
    return invocation.cwd / invocation.state_dir() / "sessions"


def session_directory(invocation: Invocation, name: str) -> Path:
    """Return the directory of a session, which may not be there.

    Raises:
        InvalidValueError: the name cannot be one of a session.
    """
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{name!r} cannot be the name of a session",
            hint="use at most 63 small letters, digits, '-', '_' and '.', a letter or digit first",
        )
    return sessions_directory(invocation) / name


def write_record(directory: Path, record: SessionRecord) -> None:
    """Write the record of a session, and make its directory.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps(asdict(record), indent=1) + "\n"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        # Only its owner may enter the directory, so nobody else reads the file before its chmod.
        replace_small_file(directory / RECORD_FILE, text.encode())
        (directory / RECORD_FILE).chmod(0o600)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}") from error


def read_record(directory: Path) -> SessionRecord:
    """Return the record of a session.

    Raises:
        NotFoundError: there is none.
        ConfigError: it cannot be read.
    """
    path = directory / RECORD_FILE
    try:
        values = json.loads(path.read_bytes())
        return SessionRecord(
            session_id=str(values["session_id"]),
            name=directory.name,
            project_id=str(values["project_id"]),
            gateway=str(values["gateway"]),
            context=str(values["context"]),
            created=float(values["created"]),
            former_context=str(values.get("former_context", "")),
            owner=str(values.get("owner", "")),
            mine=bool(values.get("mine", True)),
            node_id=str(values.get("node_id", "")),
            gpu=bool(values.get("gpu", False)),
            started=float(values.get("started", 0.0)),
        )
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no session {directory.name!r} on this machine", hint="run 'offload start'"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read {path}", hint=f"run 'offload stop {directory.name}', or remove it"
        ) from error


def list_records(invocation: Invocation) -> list[SessionRecord]:
    """Return the records of all sessions of this machine, by name; those that are broken not."""
    found = []
    with contextlib.suppress(OSError):
        for directory in sorted(sessions_directory(invocation).iterdir()):
            with contextlib.suppress(NotFoundError, ConfigError):
                found.append(read_record(directory))
    return found


def remove_record(directory: Path) -> None:
    """Forget a session; nothing happens when there is none.

    Raises:
        ConfigError: it cannot be removed.
    """
    try:
        # First, so that the helper ends whatever becomes of the rest.
        (directory / RECORD_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot remove {directory}: {error.strerror}") from error
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(_socket_directory(directory), ignore_errors=True)


def note_end(directory: Path, reason: str) -> None:
    """Write down why a session has ended; where that cannot be, its helper alone says so."""
    with contextlib.suppress(OSError):
        replace_small_file(directory / END_FILE, reason.encode()[:_MAX_END_BYTES])


def forget_end(directory: Path) -> None:
    """Take a session for one that is there, as somebody uses it again."""
    with contextlib.suppress(OSError):
        (directory / END_FILE).unlink(missing_ok=True)


def noted_end(directory: Path) -> str:
    """Return why a session has ended; empty when it has not, as far as this machine knows."""
    try:
        with (directory / END_FILE).open("rb") as file:
            return file.read(_MAX_END_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def engine_socket(directory: Path) -> Path:
    """Return where the API of a session's engine is for docker clients."""
    return _socket_directory(directory) / "engine.sock"


def helper_socket(directory: Path) -> Path:
    """Return where the helper of a session listens for our commands."""
    return _socket_directory(directory) / "helper.sock"


def _socket_directory(directory: Path) -> Path:
    """Return where the sockets of a session are: with it, unless that path is too long."""
    if len(os.fsencode(directory / "engine.sock")) <= _MAX_SOCKET_BYTES:
        return directory
    name = hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
    return Path(f"/tmp/offload-{os.getuid()}/sessions/{name}")  # noqa: S108 - owner is checked


def prepare_sockets(directory: Path) -> None:
    """Make the place of a session's sockets, for their owner alone.

    Raises:
        ConfigError: somebody else has taken it, or it cannot be made.
    """
    place = _socket_directory(directory)
    try:
        if place == directory:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            ours = [place]
        else:
            ours = [place.parent.parent, place.parent, place]
        # From above, so that nothing is made or changed below what somebody else has planted.
        for folder in ours:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise ConfigError(f"{folder} is no directory of yours")
            if status.st_mode & 0o077:
                folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot make {place}: {error.strerror}") from error
