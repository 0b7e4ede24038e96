"""The node's identity: a key that never leaves its disk, a certificate from the gateway."""

from __future__ import annotations

import os
import ssl
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
from offload_core.trust import fetch_pinned_ca
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
    """Return the node's identity, enrolling at the gateway when there is none or it is old.

    Raises:
        ConfigError: no certificate and no token to get one.
        AuthenticationError: the gateway refuses the token.
        GatewayUnreachableError: the gateway does not answer.
    """
    folder = config.data / "identity"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stored = _load(folder)
    if stored is not None and not _needs_renewal(stored.keys.certificate_pem):
        return stored
    token = config.enrolment_token()
    if not token:
        if stored is not None and not _expired(stored.keys.certificate_pem):
            return stored
        raise ConfigError(
            "this node is not enrolled: set token or token_file to an enrolment token made with "
            "'offload-builder token create --role node NAME'"
        )
    identity = await _enroll(config, token)
    _save(folder, identity)
    log.info("node.enrolled", node_id=identity.node_id)
    return identity


async def _enroll(config: NodeConfig, token: str) -> NodeIdentity:
    ca_pem = await fetch_pinned_ca(config.gateway, token)
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, config.name())]))
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    async with open_channel(config.gateway, ENROLL_NAME, ca_pem=ca_pem) as channel:
        try:
            reply = await EnrollmentServiceStub(channel).EnrollNode(
                EnrollNodeRequest(
                    token=token,
                    node_id=config.name(),
                    csr_pem=request.public_bytes(serialization.Encoding.PEM),
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
    if ssl.PEM_cert_to_DER_cert(reply.ca_pem.decode()) != ssl.PEM_cert_to_DER_cert(ca_pem.decode()):
        raise AuthenticationError("the gateway answered with another CA than the token names")
    return NodeIdentity(reply.node_id, keys)


def _save(folder: Path, identity: NodeIdentity) -> None:
    files = {
        "key.pem": identity.keys.private_key_pem,
        "cert.pem": identity.keys.certificate_pem,
        "ca.pem": identity.keys.ca_pem,
        # Written last: a folder without it is an enrolment that did not finish.
        "node_id": identity.node_id.encode(),
    }
    for name, data in files.items():
        path = folder / f"{name}.new"
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            os.write(file, data)
        finally:
            os.close(file)
        path.replace(folder / name)


def _load(folder: Path) -> NodeIdentity | None:
    try:
        keys = KeyPair(
            certificate_pem=(folder / "cert.pem").read_bytes(),
            private_key_pem=(folder / "key.pem").read_bytes(),
            ca_pem=(folder / "ca.pem").read_bytes(),
        )
        return NodeIdentity((folder / "node_id").read_text(), keys)
    except FileNotFoundError:
        return None


def _needs_renewal(certificate_pem: bytes) -> bool:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return datetime.now(UTC) > certificate.not_valid_before_utc + lifetime / 2


def _expired(certificate_pem: bytes) -> bool:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return datetime.now(UTC) > certificate.not_valid_after_utc - timedelta(minutes=5)
