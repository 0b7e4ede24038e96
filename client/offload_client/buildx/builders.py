"""Builders that this user has made: what they are for, and their certificate files.

Each has a directory `buildx/NAME` below our configuration, readable by the user only:
`builder.json`, `ca.pem`, and `client.pem` with certificate and private key. buildx reads the PEM
files at every command. Certificate and key are one file, replaced at once, so that a command that
reads while they are renewed does not get halves that do not belong together.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError, InvalidValueError, NotFoundError
from offload_core.tls import BUILDKIT_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation

FOLDER = "buildx"
DEFAULT_NAME = "offload"
DUE_FILE = "due"
"""Its modification time is the moment from which a certificate should be renewed."""
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]{0,62}")


@dataclass(frozen=True)
class Builder:
    """One builder.

    Attributes:
        name: in buildx, which knows small letters only.
        gateway: HOST:PORT.
        project: that its builds belong to.
        platforms: that buildx is told; empty to let it ask.
        node: what buildx calls the one place that the builder has.
    """

    name: str
    gateway: str
    project: str
    platforms: tuple[str, ...] = ()
    node: str = ""

    @property
    def endpoint(self) -> str:
        """The address as buildx writes it."""
        return f"tcp://{self.gateway}"

    @property
    def server_name(self) -> str:
        """The name in TLS, which says the project."""
        return f"{self.project}{BUILDKIT_SUFFIX}"


def check_name(text: str) -> str:
    """Return a builder's name as buildx keeps it.

    Raises:
        InvalidValueError: buildx would refuse it. Source: buildx, store/util.go.
    """
    if _NAME.fullmatch(text) is None:
        raise InvalidValueError(
            f'"{text}" is no name for a builder: a letter, then letters, digits and . _ -'
        )
    return text.lower()


def builders_folder(invocation: Invocation) -> Path:
    """Return the directory of all builders."""
    return invocation.config_dir() / FOLDER


def builder_folder(invocation: Invocation, name: str) -> Path:
    """Return the directory of one builder."""
    return builders_folder(invocation) / name


def driver_options(invocation: Invocation, builder: Builder) -> dict[str, str]:
    """Return what buildx's driver `remote` has to know."""
    folder = builder_folder(invocation, builder.name)
    return {
        "cacert": str(folder / "ca.pem"),
        "cert": str(folder / "client.pem"),
        "key": str(folder / "client.pem"),
        "servername": builder.server_name,
    }


def list_builders(invocation: Invocation) -> list[Builder]:
    """Return all builders by name.

    Raises:
        ConfigError: one cannot be read.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = sorted(path.parent.name for path in builders_folder(invocation).glob("*/*.json"))
        return [find_builder(invocation, name) for name in names]
    return []


def find_builder(invocation: Invocation, name: str) -> Builder:
    """Return one builder.

    Raises:
        NotFoundError: there is none of this name.
        ConfigError: it cannot be read.
    """
    path = builder_folder(invocation, check_name(name)) / "builder.json"
    try:
        told = json.loads(path.read_bytes())
        return Builder(**told | {"platforms": tuple(told["platforms"])})
    except FileNotFoundError:
        raise NotFoundError(
            f'there is no builder "{name}"', hint="make it with 'offload buildx create'"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"cannot read {path}: {error}; remove its directory") from error


def save_builder(invocation: Invocation, builder: Builder, identity: StoredIdentity) -> None:
    """Write a builder with its certificate.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = builder_folder(invocation, builder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_identity(invocation, builder, identity)
        _write(folder / "builder.json", json.dumps(asdict(builder), indent=1).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from error


def write_identity(invocation: Invocation, builder: Builder, identity: StoredIdentity) -> bool:
    """Replace the certificate of a builder; return whether it is another one than before.

    Raises:
        ConfigError: it cannot be written.
    """
    keys = identity.keys
    client = keys.certificate_pem.rstrip() + b"\n" + keys.private_key_pem
    folder = builder_folder(invocation, builder.name)
    changed = False
    try:
        for name, data in (("ca.pem", keys.ca_pem), ("client.pem", client)):
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                _write(path, data)
                changed = True
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from error
    return changed


def drop_identity(invocation: Invocation, builder: Builder) -> bool:
    """Delete the certificate of a builder; return whether there was one.

    Raises:
        ConfigError: it cannot be deleted.
    """
    path = builder_folder(invocation, builder.name) / "client.pem"
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"cannot delete {path}: {error.strerror}") from error
    return True


def forget_builder(invocation: Invocation, name: str) -> None:
    """Delete a builder with its certificate.

    Raises:
        ConfigError: it cannot be deleted.
    """
    folder = builder_folder(invocation, name)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot delete {folder}: {error.strerror}") from error


def certificate_times(invocation: Invocation, builder: Builder) -> tuple[float, float] | None:
    """Return begin and end of a builder's certificate in seconds since 1970, None without one."""
    from cryptography import x509

    try:
        data = (builder_folder(invocation, builder.name) / "client.pem").read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
    except (OSError, ValueError):
        return None
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin.timestamp(), end.timestamp()


def is_half_over(begin: float, end: float) -> bool:
    """Return whether a certificate has lived more than half its life."""
    return time.time() > (begin + end) / 2


def note_due(invocation: Invocation, *, not_before: float = 0.0) -> None:
    """Write down when the next certificate should be renewed.

    Args:
        invocation: the command.
        not_before: seconds since 1970 before which it is not tried again.
    """
    folder = builders_folder(invocation)
    halves = [
        sum(times) / 2
        for builder in list_builders(invocation)
        if (times := certificate_times(invocation, builder)) is not None
    ]
    path = folder / DUE_FILE
    # Failing to is no error: then the next command that looks renews.
    with contextlib.suppress(OSError):
        if not halves:
            path.unlink(missing_ok=True)
            return
        moment = max(min(halves), not_before)
        # Not touched: for a moment another command would think that it is due.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        os.utime(path, (moment, moment))


def of_gateway(builders: Sequence[Builder], gateway: str) -> list[Builder]:
    """Return the builders of one gateway."""
    return [builder for builder in builders if builder.gateway == gateway]


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        file = os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "wb") as stream:  # noqa: PTH123 - the mode counts from the first moment
            stream.write(data)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
