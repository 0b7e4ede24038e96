"""The gateway's certificate authority: certificates for itself, for members and for nodes.

ECDSA P-256 certificates by RFC 5280. The files below the data directory are the root of all trust:
`ca.key` and `ticket.key` are private to the gateway's user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from offload_builder.gateway import caset
from offload_core.errors import AuthenticationError, ConfigError, UsageError
from offload_core.tls import (
    BUILDKIT_SUFFIX,
    ENROLL_NAME,
    GATEWAY_NAME,
    NODE_SUFFIX,
    Identity,
    KeyPair,
    certificate_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CA_LIFETIME = caset.CA_LIFETIME
CLOCK_SKEW = caset.CLOCK_SKEW
GATEWAY_LIFETIME = timedelta(days=90)

_NOT_OURS = "the client certificate is not one of this pool; run: offload login"

NODE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""A DNS label (RFC 1035, section 2.3.1) of at most 40 characters; it is part of a server name."""


_GATEWAY_NAMES = (GATEWAY_NAME, ENROLL_NAME, "*" + BUILDKIT_SUFFIX)
"""The last one for clients of BuildKit's API that have to be told that there is no node."""


@dataclass(frozen=True)
class Issued:
    """A certificate with the end of its validity."""

    certificate_pem: bytes
    expires_at: datetime


class CertificateAuthority:
    """Signs certificates and owns the key that signs tickets. Not bound to an event loop."""

    def __init__(
        self, directory: Path, found: caset.CaSet, ticket_key: ed25519.Ed25519PrivateKey
    ) -> None:
        """Use loaded keys; see `open`."""
        self._directory = directory
        self._state = caset.state(directory)
        self.ticket_key = ticket_key
        self._take(found)

    def _take(self, found: caset.CaSet) -> None:
        self._key = found.key
        self._certificate = found.certificate
        self.trusted = (found.certificate, *found.others)
        """CAs whose certificates count; the one that signs comes first."""
        self._links = found.links
        self.rotation = found.rotation

    @classmethod
    def open(cls, directory: Path) -> CertificateAuthority:
        """Load the CA of a data directory, or create it on the first start.

        Safe against a second process that does the same at the same time.

        Raises:
            ConfigError: the directory or a file in it cannot be used.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with caset.locked(directory):
                if not (directory / "ca.pem").exists():
                    ticket = ed25519.Ed25519PrivateKey.generate()
                    caset.write(directory / "ticket.key", caset.private_pem(ticket))
                    caset.create(directory)
                ticket_key = caset.read_key(directory / "ticket.key")
                found = caset.read(directory)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"cannot use the gateway's keys in {directory}: {error}") from error
        if not isinstance(ticket_key, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{directory}/ticket.key is not an Ed25519 key")
        if found.certificate.not_valid_after_utc <= datetime.now(UTC):
            raise ConfigError(
                f"the certificate authority in {directory} expired "
                f"on {found.certificate.not_valid_after_utc:%Y-%m-%d}; "
                "move the directory away and make new tokens"
            )
        return cls(directory, found, ticket_key)

    def refresh(self) -> bool:
        """Take over what a command has changed in the files; tell if it did.

        Raises:
            ConfigError: a file cannot be used; everything stays as it is.
        """
        state = caset.state(self._directory)
        if state == self._state:
            return False
        try:
            with caset.locked(self._directory):
                state = caset.state(self._directory)
                found = caset.read(self._directory)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"cannot use the gateway's keys in {self._directory}: {error}"
            ) from error
        self._state = state
        self._take(found)
        return True

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self._directory

    @property
    def ca_pem(self) -> bytes:
        """PEM of every CA to trust, the one that signs first."""
        return b"".join(caset.pem(item) for item in self.trusted)

    @property
    def chain_pem(self) -> bytes:
        """PEM of what a server shows behind its own certificate.

        The CA itself, because a client at its first login knows only its fingerprint; and links to
        it from former ones, for clients that know one of those.
        """
        return b"".join(caset.pem(item) for item in (self._certificate, *self._links))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the DER form of the CA that signs, 64 hex characters."""
        return caset.fingerprint(self._certificate)

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints of all CAs that are trusted, the one that signs first."""
        return tuple(caset.fingerprint(item) for item in self.trusted)

    def pinned_fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints by which clients can find this gateway, former CAs included."""
        return (self.fingerprint(), *(caset.fingerprint(item) for item in self._links[::2]))

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
            with caset.locked(self._directory):
                keys = self._stored_gateway_keys(path, now)
                if keys is None:
                    keys = self._new_gateway_keys(now)
                    caset.write(path, keys.private_key_pem + keys.certificate_pem)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        return keys

    def _stored_gateway_keys(self, path: Path, now: datetime) -> KeyPair | None:
        try:
            text = path.read_bytes()
            certificate = x509.load_pem_x509_certificate(text)
            certificate.verify_directly_issued_by(self._certificate)
            begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            known = names.value.get_values_for_type(x509.DNSName)
            if now >= begin + (end - begin) / 2 or known != list(_GATEWAY_NAMES):
                return None
            key = serialization.load_pem_private_key(text, None)
            if key.public_key() != certificate.public_key():
                return None
        except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return None
        return KeyPair(
            certificate.public_bytes(serialization.Encoding.PEM),
            caset.private_pem(key),
            self.ca_pem,
        )

    def _new_gateway_keys(self, now: datetime) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(
            key.public_key(),
            GATEWAY_NAME,
            [x509.DNSName(name) for name in _GATEWAY_NAMES],
            [ExtendedKeyUsageOID.SERVER_AUTH],
            now + GATEWAY_LIFETIME,
        )
        return KeyPair(issued.certificate_pem, caset.private_pem(key), self.ca_pem)

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
        return KeyPair(
            issued.certificate_pem, caset.private_pem(key), self.ca_pem
        ), issued.expires_at

    def key_hash(self, csr_pem: bytes) -> str:
        """Return the SHA-256 of the public key in a certificate request, 64 hex characters.

        Raises:
            UsageError: the request cannot be used.
        """
        public = _public_key_of(csr_pem).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        digest = hashes.Hash(hashes.SHA256())
        digest.update(public)
        return digest.finalize().hex()

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
                # Any node may be the one that builds for a project.
                x509.DNSName("*" + BUILDKIT_SUFFIX),
                x509.UniformResourceIdentifier(identity.uri()),
            ],
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            expires_at,
        )

    def identity_of(self, certificate_der: bytes, now: datetime | None = None) -> Identity:
        """Return whom a certificate of ours speaks for now.

        Raises:
            AuthenticationError: it is not ours, not valid now, or names nobody.
        """
        now = now or datetime.now(UTC)
        try:
            certificate = x509.load_der_x509_certificate(certificate_der)
        except (ValueError, TypeError) as error:
            raise AuthenticationError(_NOT_OURS) from error
        if not any(_issued_by(certificate, authority) for authority in self.trusted):
            raise AuthenticationError(_NOT_OURS)
        return certificate_identity(certificate, now)

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
            .subject_name(caset.common_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(expires_at)
            .add_extension(x509.SubjectAlternativeName(list(alternative_names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(caset.key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), expires_at)


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


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
