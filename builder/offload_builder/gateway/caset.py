"""The files of the certificate authority, also while one CA replaces another.

`ca.pem` with `ca.key` signs. While it is replaced there is a second one that is trusted: `ca-next`,
which signs later, or `ca-old.pem`, which has signed before. `ca-links.pem` has the certificates of
former CAs, each followed by a link: name and key of its successor, signed by it. So a client that
knows a former one only, by the fingerprint in its token, can follow the links to the present one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from offload_core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CA_LIFETIME = timedelta(days=3650)
CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin this long ago, for peers whose clocks are behind."""
MAX_LINKS = 4
"""Former CAs whose tokens still lead here; each adds about 1.2 KB to a TLS handshake."""

CURRENT, NEXT, OLD = "ca", "ca-next", "ca-old"
LINKS, ROTATION, LOCK = "ca-links.pem", "ca-rotation.json", "ca.lock"
WATCHED = ("ca.pem", "ca-next.pem", "ca-old.pem", LINKS, ROTATION)


@dataclass(frozen=True)
class Rotation:
    """How far a replacement is; times in seconds since 1970, 0 for not yet."""

    started_at: float
    switch_at: float
    """When the new CA signs, if all nodes that are there know it by then."""
    switched_at: float = 0.0


@dataclass(frozen=True)
class CaSet:
    """Everything that the files say."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    others: tuple[x509.Certificate, ...]
    """Trusted as well."""
    links: tuple[x509.Certificate, ...]
    """Former CAs, each before its link."""
    rotation: Rotation | None


def read(directory: Path) -> CaSet:
    """Read the CA of a directory; the caller holds the lock.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file has something else.
    """
    _complete_switch(directory)
    key = read_key(directory / "ca.key")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("ca.key is not an ECDSA key")
    others = [_certificates(directory / f"{name}.pem") for name in (NEXT, OLD)]
    rotation = None
    with contextlib.suppress(FileNotFoundError):
        rotation = Rotation(**json.loads((directory / ROTATION).read_text("utf-8")))
    certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    if key.public_key() != certificate.public_key():
        raise ValueError("ca.key does not belong to ca.pem")
    return CaSet(
        key,
        certificate,
        tuple(item for found in others for item in found),
        tuple(_certificates(directory / LINKS)),
        rotation,
    )


def create(directory: Path, name: str = CURRENT) -> x509.Certificate:
    """Write a new CA; its certificate comes last and marks it as complete."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    # Each has a name of its own, so that no verifier takes one for the other.
    common = "offload-build CA" if name == CURRENT else f"offload-build CA {now:%Y-%m-%d %H:%M:%S}"
    certificate = _signed(common, key.public_key(), common, key, now + CA_LIFETIME)
    write(directory / f"{name}.key", private_pem(key))
    write(directory / f"{name}.pem", pem(certificate), mode=0o644)
    return certificate


def create_next(directory: Path, now: CaSet, rotation: Rotation) -> x509.Certificate:
    """Write the CA that is to follow, and the link that leads to it."""
    following = create(directory, NEXT)
    name = _common_name(following)
    public = following.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise InternalError("the new CA has a key of a kind that it never makes")
    end = now.certificate.not_valid_after_utc
    link = _signed(name, public, _common_name(now.certificate), now.key, end)
    kept = [*now.links, now.certificate, link][-2 * MAX_LINKS :]
    _write_links(directory, tuple(kept))
    write_rotation(directory, rotation)
    return following


def drop_next(directory: Path, now: CaSet) -> None:
    """Take back `create_next`."""
    for suffix in ("pem", "key"):
        (directory / f"{NEXT}.{suffix}").unlink(missing_ok=True)
    _write_links(directory, now.links[:-2])
    (directory / ROTATION).unlink(missing_ok=True)


def switch(directory: Path, now: CaSet, rotation: Rotation) -> None:
    """Let the new CA sign; a crash in between is completed by the next `read`."""
    write(directory / f"{OLD}.pem", pem(now.certificate), mode=0o644)
    # From here on the key says that the switch has happened.
    (directory / f"{NEXT}.key").replace(directory / "ca.key")
    (directory / f"{NEXT}.pem").replace(directory / "ca.pem")
    write_rotation(directory, rotation)


def drop_old(directory: Path, *, forget_tokens: bool) -> None:
    """Trust the old CA no longer; also refuse tokens that name it, if so wished."""
    (directory / f"{OLD}.pem").unlink(missing_ok=True)
    if forget_tokens:
        (directory / LINKS).unlink(missing_ok=True)
    (directory / ROTATION).unlink(missing_ok=True)


def write_rotation(directory: Path, rotation: Rotation) -> None:
    """Note how far it is."""
    write(directory / ROTATION, json.dumps(asdict(rotation)).encode())


def state(directory: Path) -> tuple[tuple[int, int], ...]:
    """Return what changes with the files."""
    found = []
    for name in WATCHED:
        try:
            status = (directory / name).stat()
        except OSError:
            found.append((0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_ino))
    return tuple(found)


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER form, 64 hex characters."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return what a key may do: that of a CA, or that of a peer in TLS."""
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


def common_name(text: str) -> x509.Name:
    """Return a name; X.520 limits it to 64 characters."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def private_pem(key: object) -> bytes:
    """Return a private key as text."""
    if not isinstance(key, (ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
        raise InternalError("the gateway's key is of a kind that it never makes")
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_key(path: Path) -> object:
    """Return a private key of ours."""
    return serialization.load_pem_private_key(path.read_bytes(), None)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
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
def locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel releases it if we die."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _complete_switch(directory: Path) -> None:
    following = directory / f"{NEXT}.pem"
    if not following.exists() or (directory / f"{NEXT}.key").exists():
        return
    certificate = x509.load_pem_x509_certificate(following.read_bytes())
    key = read_key(directory / "ca.key")
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
        following.replace(directory / "ca.pem")


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return x509.load_pem_x509_certificates(data) if data.strip() else []


def _write_links(directory: Path, links: tuple[x509.Certificate, ...]) -> None:
    if links:
        write(directory / LINKS, b"".join(pem(item) for item in links), mode=0o644)
    else:
        (directory / LINKS).unlink(missing_ok=True)


def _common_name(certificate: x509.Certificate) -> str:
    value = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _signed(
    subject: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    end: datetime,
) -> x509.Certificate:
    """Return the certificate of a CA, by itself or by another one."""
    own = x509.SubjectKeyIdentifier.from_public_key(public_key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(common_name(subject))
        .issuer_name(common_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - CLOCK_SKEW)
        .not_valid_after(end.replace(microsecond=0))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(own, critical=False)
    )
    return builder.sign(key, hashes.SHA256())
