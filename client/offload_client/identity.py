"""The user's certificate: got with a token at login, renewed in the background of commands.

Only the certificate and its key are kept on disk (mode 0600), never the token. A pipeline sets
OFFLOAD_TOKEN instead; then nothing is written at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class StoredIdentity:
    """A certificate with its validity."""

    keys: KeyPair
    expires_at: float
    """Seconds since 1970 UTC."""

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

    Raises:
        ConfigError: it cannot be written there.
    """
    folder = _folder(invocation, gateway)
    # One file, replaced at once: a certificate never stands beside the key of another.
    text = b"\n".join(
        (
            f"expires {identity.expires_at:.0f}".encode(),
            identity.keys.certificate_pem,
            b"---",
            identity.keys.private_key_pem,
            b"---",
            identity.keys.ca_pem,
        )
    )
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
        raise ConfigError(f"cannot store the login in {folder}: {error.strerror}") from error


def load_identity(invocation: Invocation, gateway: str) -> StoredIdentity:
    """Read the identity for a gateway.

    Raises:
        AuthenticationError: there is none, or it has expired.
    """
    hint = f"run 'offload login https://{gateway} --token TOKEN'"
    try:
        head, _, rest = (_folder(invocation, gateway) / "identity").read_bytes().partition(b"\n")
        certificate, key, ca = rest.split(b"\n---\n")
        identity = StoredIdentity(KeyPair(certificate, key, ca), float(head.split()[1]))
    except FileNotFoundError:
        raise AuthenticationError(f"you are not logged in at {gateway}", hint=hint) from None
    except (OSError, ValueError, IndexError) as error:
        raise AuthenticationError(
            f"the stored login for {gateway} cannot be read", hint=hint
        ) from error
    if identity.expires_at <= time.time():
        raise AuthenticationError(f"your login at {gateway} has expired", hint=hint)
    return identity


def forget_identity(invocation: Invocation, gateway: str) -> bool:
    """Delete the identity for a gateway; return whether there was one.

    Raises:
        ConfigError: it cannot be deleted.
    """
    path = _folder(invocation, gateway) / "identity"
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"cannot delete {path}: {error.strerror}") from error
    return True


def needs_renewal(identity: StoredIdentity) -> bool:
    """Return whether the certificate should be replaced soon."""
    return identity.expires_at - time.time() < RENEW_BEFORE_SECONDS


def _folder(invocation: Invocation, gateway: str) -> Path:
    safe = "".join(char if char.isalnum() or char in ".-" else "_" for char in gateway)
    return invocation.config_dir() / "gateways" / safe
