"""The gateway's certificate authority: certificates for itself, for members and for nodes.

ECDSA P-256 certificates by RFC 5280. The files below the data directory are the root of all trust:
`ca.key` and `ticket.key` are private to the gateway's user.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from offload_core.errors import ConfigError, InternalError, UsageError
from offload_core.tls import ENROLL_NAME, GATEWAY_NAME, NODE_SUFFIX, Identity, KeyPair

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

CA_LIFETIME = timedelta(days=3650)
GATEWAY_LIFETIME = timedelta(days=90)
CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin this long ago, for peers whose clocks are behind."""

NODE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""A DNS label (RFC 1035, section 2.3.1) of at most 40 characters; it is part of a server name."""


@dataclass(frozen=True)
class Issued:
    """A certificate with the end of its validity."""

    certificate_pem: bytes
    expires_at: datetime


class CertificateAuthority:
    """Signs certificates and owns the key that signs tickets. Not bound to an event loop."""

    def __init__(
        self,
        directory: Path,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        ticket_key: ed25519.Ed25519PrivateKey,
    ) -> None:
        """Use loaded keys; see `open`."""
        self._directory = directory
        self._key = key
        self._certificate = certificate
        self.ticket_key = ticket_key
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def open(cls, directory: Path) -> CertificateAuthority:
        """Load the CA of a data directory, or create it on the first start.

        Safe against a second process that does the same at the same time.

        Raises:
            ConfigError: the directory or a file in it cannot be used.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(directory / "ca.lock"):
                if not (directory / "ca.pem").exists():
                    _create(directory)
                key = _read_key(directory / "ca.key")
                ticket_key = _read_key(directory / "ticket.key")
                certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot use the gateway's keys in {directory}: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{directory}/ca.key is not an ECDSA key")
        if not isinstance(ticket_key, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{directory}/ticket.key is not an Ed25519 key")
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{directory}/ca.key does not belong to {directory}/ca.pem")
        if certificate.not_valid_after_utc <= datetime.now(UTC):
            raise ConfigError(
                f"the certificate authority in {directory} expired "
                f"on {certificate.not_valid_after_utc:%Y-%m-%d}; "
                "move the directory away and make new tokens"
            )
        return cls(directory, key, certificate, ticket_key)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the CA certificate's DER form, 64 hex characters."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def ticket_public_pem(self) -> bytes:
        """Return the PEM public key with which nodes verify tickets."""
        return self.ticket_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def gateway_keys(self, now: datetime | None = None) -> KeyPair:
        """Return the gateway's server certificate, renewed when half of its life is over."""
        now = now or datetime.now(UTC)
        path = self._directory / "gateway.pem"
        try:
            with _locked(self._directory / "ca.lock"):
                keys = self._stored_gateway_keys(path, now)
                if keys is None:
                    keys = self._new_gateway_keys(now)
                    _write(path, keys.private_key_pem + keys.certificate_pem)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        return keys

    def _stored_gateway_keys(self, path: Path, now: datetime) -> KeyPair | None:
        try:
            text = path.read_bytes()
            certificate = x509.load_pem_x509_certificate(text)
            certificate.verify_directly_issued_by(self._certificate)
            begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if now >= begin + (end - begin) / 2:
                return None
            key = serialization.load_pem_private_key(text, None)
            if key.public_key() != certificate.public_key():
                return None
        except (OSError, ValueError, TypeError, InvalidSignature):
            return None
        return KeyPair(
            certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key), self.ca_pem
        )

    def _new_gateway_keys(self, now: datetime) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(
            key.public_key(),
            GATEWAY_NAME,
            [x509.DNSName(GATEWAY_NAME), x509.DNSName(ENROLL_NAME)],
            [ExtendedKeyUsageOID.SERVER_AUTH],
            now + GATEWAY_LIFETIME,
        )
        return KeyPair(issued.certificate_pem, _private_pem(key), self.ca_pem)

    def issue_member(self, identity: Identity, expires_at: datetime) -> tuple[KeyPair, datetime]:
        """Return a client certificate with a fresh key, and when it ends."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(
            key.public_key(),
            identity.name,
            [x509.UniformResourceIdentifier(identity.uri())],
            [ExtendedKeyUsageOID.CLIENT_AUTH],
            expires_at,
        )
        return KeyPair(issued.certificate_pem, _private_pem(key), self.ca_pem), issued.expires_at

    def issue_node(
        self, csr_pem: bytes, *, node_id: str, token_id: str, expires_at: datetime
    ) -> Issued:
        """Return the certificate of a node, for serving and as a client.

        Only the public key of the request is used; names come from what was authorised.

        Raises:
            UsageError: the request or the name cannot be used.
        """
        if NODE_ID.fullmatch(node_id) is None:
            raise UsageError(
                f'"{node_id[:80]}" cannot be the name of a node: '
                "at most 40 lower-case letters, digits and dashes, no dash at an end"
            )
        identity = Identity("node", node_id, token_id, "node")
        return self._issue(
            _public_key_of(csr_pem),
            node_id,
            [
                x509.DNSName(node_id + NODE_SUFFIX),
                x509.UniformResourceIdentifier(identity.uri()),
            ],
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            expires_at,
        )

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        name: str,
        alternative_names: Iterable[x509.GeneralName],
        usages: list[x509.ObjectIdentifier],
        expires_at: datetime,
    ) -> Issued:
        expires_at = min(expires_at, self._certificate.not_valid_after_utc).replace(microsecond=0)
        begin = min(datetime.now(UTC), expires_at) - CLOCK_SKEW
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(expires_at)
            .add_extension(x509.SubjectAlternativeName(list(alternative_names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), expires_at)


def _public_key_of(csr_pem: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        valid, key = request.is_signature_valid, request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError("the certificate request of the node is not valid PEM PKCS #10") from error
    if not valid:
        raise UsageError("the certificate request of the node is not signed by its own key")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.key_size >= 256:
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return key
    raise UsageError("the key of the node must be ECDSA (256 bits) or RSA (2048 bits) or larger")


def _create(directory: Path) -> None:
    """Write a new CA; `ca.pem` comes last and marks it as complete."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = _name("offload-build CA")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(directory / "ca.key", _private_pem(key))
    _write(directory / "ticket.key", _private_pem(ed25519.Ed25519PrivateKey.generate()))
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    _write(directory / "ca.pem", pem, mode=0o644)


def _name(common_name: str) -> x509.Name:
    # X.520 limits the common name to 64 characters.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: object) -> bytes:
    if not isinstance(key, (ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
        raise InternalError("the gateway's key is of a kind that it never makes")
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read_key(path: Path) -> object:
    return serialization.load_pem_private_key(path.read_bytes(), None)


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole; it never exists with wider permissions or half its content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel releases it if we die."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
