"""The user's certificate: got at login, renewed in the background of commands.

Only the certificate, its key and what renews it are kept (mode 0600, secrets in the system's
keyring where there is one), never a token of ours. A pipeline sets OFFLOAD_TOKEN, or has a token
of its identity provider; then nothing is written at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.oidc.secretshelf import put_secret, remove_secret, take_secret
from offload_core.errors import AuthenticationError, ConfigError, GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.tls import ENROLL_NAME, KeyPair, open_channel
from offload_core.trust import fetch_pinned_ca
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.invocation import Invocation
    from offload_proto.v1.identity_service_pb2 import ClientCertificate, LoginResponse

LOGIN_SECONDS = 20.0
RENEW_BEFORE_SECONDS = 3 * 86400
RENEW_EARLY_SECONDS = 600.0
"""For certificates that live for an hour."""

_IN_KEYRING = b"keyring "


@dataclass(frozen=True)
class Origin:
    """An identity provider behind a login.

    Attributes:
        kind: "pipeline" or "person".
        source: system of the pipeline, or URL of the issuer.
        job: what differs from job to job.
        client_id: of our client at the issuer.
        scopes: that were asked for.
        refresh_token: gets a new token without asking the person; empty without one.
    """

    kind: str
    source: str
    job: str = ""
    client_id: str = ""
    scopes: tuple[str, ...] = ()
    refresh_token: str = field(default="", repr=False)


@dataclass(frozen=True)
class StoredIdentity:
    """A certificate with its validity."""

    keys: KeyPair
    expires_at: float
    """Seconds since 1970 UTC."""
    origin: Origin | None = None
    """None behind a token of the gateway."""

    def cache_key(self) -> str:
        """Return a name for connections that are made with this identity."""
        return hashlib.sha256(self.keys.certificate_pem).hexdigest()


async def login(gateway: str, token: str) -> tuple[StoredIdentity, LoginResponse]:
    """Exchange a token for a certificate.

    Raises:
        AuthenticationError: the token is wrong, expired, revoked or for another gateway.
        GatewayUnreachableError: the gateway does not answer.
    """
    import grpc

    from offload_proto.v1.identity_service_pb2 import LoginRequest
    from offload_proto.v1.identity_service_pb2_grpc import EnrollmentServiceStub

    ca_pem = await fetch_pinned_ca(gateway, token)
    async with open_channel(gateway, ENROLL_NAME, ca_pem=ca_pem) as channel:
        try:
            reply = await EnrollmentServiceStub(channel).Login(
                LoginRequest(token=token.strip()), timeout=LOGIN_SECONDS, metadata=call_metadata()
            )
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer=f"the gateway at {gateway}",
                unreachable=GatewayUnreachableError,
            ) from error
    return from_certificate(reply.certificate), reply


def from_certificate(certificate: ClientCertificate) -> StoredIdentity:
    """Return the identity in a message of the gateway."""
    keys = KeyPair(certificate.certificate_pem, certificate.private_key_pem, certificate.ca_pem)
    return StoredIdentity(keys, float(certificate.expires_at.seconds))


def save_identity(invocation: Invocation, gateway: str, identity: StoredIdentity) -> None:
    """Write an identity to the configuration directory, readable by the user only.

    The key and what renews it go to the system's keyring where one is in use.

    Raises:
        ConfigError: it cannot be written there.
    """
    folder = identity_folder(invocation, gateway)
    origin = identity.origin
    key = identity.keys.private_key_pem
    before = _keyring_name(folder)
    secret = {"key": key.decode("ascii"), "refresh": origin.refresh_token if origin else ""}
    # A name of its own for each key: the old file goes on with the old one until it is replaced.
    name = f"{gateway} {identity.cache_key()[:16]}"
    if put_secret(invocation.environment, name, json.dumps(secret)):
        key, origin = _IN_KEYRING + name.encode(), origin and _without_secret(origin)
    else:
        name = ""
    # One file, replaced at once: a certificate never stands beside the key of another.
    sections = [identity.keys.certificate_pem, key, identity.keys.ca_pem]
    if origin is not None:
        sections.append(json.dumps(dataclasses.asdict(origin)).encode())
    text = f"expires {identity.expires_at:.0f}\n".encode() + b"\n---\n".join(sections)
    scratch = folder / f"identity.{os.getpid()}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "wb") as stream:  # noqa: PTH123 - the mode counts from the first moment
            stream.write(text)
        scratch.replace(folder / "identity")
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        if name and name != before:
            remove_secret(name)
        raise ConfigError(f"cannot store the login in {folder}: {error.strerror}") from error
    if before and before != name:
        remove_secret(before)


def load_identity(
    invocation: Invocation, gateway: str, *, ended_too: bool = False
) -> StoredIdentity:
    """Read the identity for a gateway.

    Args:
        invocation: the command.
        gateway: HOST:PORT.
        ended_too: also one that has expired and may be renewed.

    Raises:
        AuthenticationError: there is none, or it has expired.
    """
    hint = f"run 'offload login https://{gateway}'"
    try:
        data = (identity_folder(invocation, gateway) / "identity").read_bytes()
    except FileNotFoundError:
        raise AuthenticationError(f"you are not logged in at {gateway}", hint=hint) from None
    except OSError as error:
        raise AuthenticationError(
            f"the stored login for {gateway} cannot be read", hint=hint
        ) from error
    try:
        identity = _parsed(data)
    except (ValueError, IndexError, TypeError) as error:
        raise AuthenticationError(
            f"the stored login for {gateway} cannot be read", hint=hint
        ) from error
    if not ended_too:
        check_not_ended(identity, gateway)
    return identity


def check_not_ended(identity: StoredIdentity, gateway: str) -> None:
    """Refuse an identity whose certificate has expired.

    Raises:
        AuthenticationError: it has.
    """
    if identity.expires_at <= time.time():
        raise AuthenticationError(
            f"your login at {gateway} has expired", hint=f"run 'offload login https://{gateway}'"
        )


def _parsed(data: bytes) -> StoredIdentity:
    head, _, rest = data.partition(b"\n")
    certificate, key, ca, *more = rest.split(b"\n---\n")
    origin = None
    if more:
        told = json.loads(more[0])
        origin = Origin(**told | {"scopes": tuple(told["scopes"])})
    if key.startswith(_IN_KEYRING):
        secret = json.loads(take_secret(key.removeprefix(_IN_KEYRING).decode()))
        key = secret["key"].encode("ascii")
        if origin is not None:
            origin = dataclasses.replace(origin, refresh_token=secret["refresh"])
    return StoredIdentity(KeyPair(certificate, key, ca), float(head.split()[1]), origin)


def forget_identity(invocation: Invocation, gateway: str) -> bool:
    """Delete the identity for a gateway; return whether there was one.

    Raises:
        ConfigError: it cannot be deleted.
    """
    folder = identity_folder(invocation, gateway)
    name = _keyring_name(folder)
    path = folder / "identity"
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"cannot delete {path}: {error.strerror}") from error
    if name:
        remove_secret(name)
    return True


def needs_renewal(identity: StoredIdentity) -> bool:
    """Return whether the certificate should be replaced soon."""
    early = RENEW_BEFORE_SECONDS if identity.origin is None else RENEW_EARLY_SECONDS
    return identity.expires_at - time.time() < early


def _without_secret(origin: Origin) -> Origin:
    return dataclasses.replace(origin, refresh_token="")


def _keyring_name(folder: Path) -> str:
    """Return the name under which the keyring has the key of a stored identity; empty if not."""
    try:
        sections = (folder / "identity").read_bytes().split(b"\n---\n")
    except OSError:
        return ""
    key = sections[1] if len(sections) > 1 else b""
    return key.removeprefix(_IN_KEYRING).decode() if key.startswith(_IN_KEYRING) else ""


def identity_folder(invocation: Invocation, gateway: str) -> Path:
    """Return where the login at a gateway is kept."""
    safe = "".join(char if char.isalnum() or char in ".-" else "_" for char in gateway)
    return invocation.config_dir() / "gateways" / safe
