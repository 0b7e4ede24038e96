"""The node's identity: a key that never leaves its disk, a certificate from the gateway."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from offload_core.errors import AuthenticationError, ConfigError, GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.tls import ENROLL_NAME, KeyPair, open_channel
from offload_core.trust import fetch_pinned_ca, fingerprints
from offload_core.versions import call_metadata
from offload_proto.v1.identity_service_pb2 import EnrollNodeRequest
from offload_proto.v1.identity_service_pb2_grpc import EnrollmentServiceStub

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.node.config import NodeConfig

log = structlog.get_logger(__name__)

ENROLL_SECONDS = 20.0


@dataclass(frozen=True)
class NodeIdentity:
    """Name and keys of an enrolled node."""

    node_id: str
    keys: KeyPair


async def ensure_identity(config: NodeConfig) -> NodeIdentity:
    """Return the node's identity, enrolling at the gateway when there is none or it has ended.

    Raises:
        ConfigError: no certificate and no token to get one.
        AuthenticationError: the gateway refuses the token.
        GatewayUnreachableError: the gateway does not answer.
    """
    folder = config.data / "identity"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stored = load_identity(folder)
    except OSError as error:
        raise ConfigError(f"cannot use {folder}: {error.strerror}") from error
    if stored is not None and not _expired(stored.keys.certificate_pem):
        # It is renewed while the node runs.
        return stored
    token = config.enrolment_token()
    if not token:
        raise ConfigError(
            "this node is not enrolled: set token or token_file to an enrolment token made with "
            "'offload-builder token create --role node NAME'"
        )
    try:
        # Kept before it is used: when the answer is lost, the next attempt is the same one.
        key_pem = own_key(folder)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    identity = await _enroll(config, token, key_pem)
    try:
        save_identity(folder, identity)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    log.info("node.enrolled", node_id=identity.node_id)
    return identity


def own_key(folder: Path) -> bytes:
    """Return the node's private key, made and stored when there is none; PEM.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / "key.pem"
    try:
        data = path.read_bytes()
        if isinstance(serialization.load_pem_private_key(data, None), ec.EllipticCurvePrivateKey):
            return data
    except (FileNotFoundError, ValueError):
        pass
    key = ec.generate_private_key(ec.SECP256R1())
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _replace(path, data)
    return data


def signing_request(key_pem: bytes, name: str) -> bytes:
    """Return a certificate signing request for a key, PEM."""
    key = serialization.load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the key of this node is of a kind that it never makes; enrol it again")
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


async def _enroll(config: NodeConfig, token: str, key_pem: bytes) -> NodeIdentity:
    ca_pem = await fetch_pinned_ca(config.gateway, token)
    async with open_channel(config.gateway_address(), ENROLL_NAME, ca_pem=ca_pem) as channel:
        try:
            reply = await EnrollmentServiceStub(channel).EnrollNode(
                EnrollNodeRequest(
                    token=token,
                    node_id=config.name(),
                    csr_pem=signing_request(key_pem, config.name()),
                ),
                timeout=ENROLL_SECONDS,
                metadata=call_metadata(),
            )
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer=f"the gateway at {config.gateway}",
                unreachable=GatewayUnreachableError,
            ) from error
    keys = KeyPair(reply.certificate_pem, key_pem, reply.ca_pem)
    if not set(fingerprints(ca_pem)) & set(fingerprints(reply.ca_pem)):
        raise AuthenticationError("the gateway answered with another CA than the token names")
    return NodeIdentity(reply.node_id, keys)


def save_identity(folder: Path, identity: NodeIdentity) -> None:
    """Store an identity; each file is replaced as a whole, and the key stays the same.

    Raises:
        OSError: it cannot be written.
    """
    files = {
        "key.pem": identity.keys.private_key_pem,
        # Before the certificate, which may be of a CA that is new.
        "ca.pem": identity.keys.ca_pem,
        "cert.pem": identity.keys.certificate_pem,
        # Written last: a folder without it is an enrolment that did not finish.
        "node_id": identity.node_id.encode(),
    }
    for name, data in files.items():
        _replace(folder / name, data)


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_name(f"{path.name}.new")
    with open(scratch, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def load_identity(folder: Path) -> NodeIdentity | None:
    """Return the identity that is stored in a directory; None when there is no whole one.

    Raises:
        ConfigError: the files are damaged.
        OSError: they cannot be read.
    """
    try:
        keys = KeyPair(
            certificate_pem=(folder / "cert.pem").read_bytes(),
            private_key_pem=(folder / "key.pem").read_bytes(),
            ca_pem=(folder / "ca.pem").read_bytes(),
        )
        identity = NodeIdentity((folder / "node_id").read_text("utf-8"), keys)
        needs_renewal(identity)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"the node's identity in {folder} is damaged; delete the directory and enrol again"
        ) from error
    return identity


def needs_renewal(identity: NodeIdentity) -> bool:
    """Return whether half of the certificate's life is over.

    Raises:
        ValueError: it is no certificate.
    """
    certificate = x509.load_pem_x509_certificate(identity.keys.certificate_pem)
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return datetime.now(UTC) > certificate.not_valid_before_utc + lifetime / 2


def _expired(certificate_pem: bytes) -> bool:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return datetime.now(UTC) > certificate.not_valid_after_utc - timedelta(minutes=5)
