"""An SSH agent for keys from files, in this process.

Answers what a build may ask of an agent: which keys there are, and signatures with them.
Sources: draft-ietf-sshm-ssh-agent (sections 3.5 to 3.7), RFC 4253 (6.6), RFC 5656 (3.1),
RFC 8332 (3), RFC 8709.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core.errors import ConfigError, InvalidValueError, UsageError
from offload_core.sshagent import (
    FAILURE,
    IDENTITIES_ANSWER,
    REQUEST_IDENTITIES,
    SIGN_REQUEST,
    SIGN_RESPONSE,
    frame,
    frame_body,
    frame_kind,
    string,
    take_string,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

    PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey

MAX_KEY_BYTES = 100 * 1024
"""As much as buildx reads of a file."""
_SHA256_FLAG = 2
_SHA512_FLAG = 4


class Keyring:
    """Keys by their public part, in the order in which they were given."""

    def __init__(self) -> None:
        self._keys: dict[bytes, tuple[PrivateKey, bytes]] = {}

    def add_file(self, path: Path, shown: str) -> None:
        """Load a private key.

        Args:
            path: the file.
            shown: how the user wrote it.

        Raises:
            InvalidValueError: it cannot be read, is no key, or wants a passphrase.
            ConfigError: the library for keys is not installed.
        """
        key = load_key(path, shown)
        self._keys[public_blob(key)] = (key, shown.encode("utf-8", "replace"))

    def answer(self, request: bytes) -> bytes:
        """Return the reply to a frame."""
        kind = frame_kind(request)
        if kind == REQUEST_IDENTITIES:
            parts = [string(blob) + string(comment) for blob, (_, comment) in self._keys.items()]
            return frame(IDENTITIES_ANSWER, len(parts).to_bytes(4, "big"), *parts)
        if kind == SIGN_REQUEST:
            try:
                blob, rest = take_string(frame_body(request))
                data, rest = take_string(rest)
            except UsageError:
                return FAILURE
            found = self._keys.get(blob)
            if found is not None:
                flags = int.from_bytes(rest[:4], "big")
                return frame(SIGN_RESPONSE, string(signature(found[0], data, flags)))
        return FAILURE


def load_key(path: Path, shown: str) -> PrivateKey:
    """Return the private key of a file, in OpenSSH's form or as PEM.

    Raises:
        InvalidValueError: it cannot be read, is no key, or wants a passphrase.
        ConfigError: the library for keys is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.hazmat.primitives.serialization import (
            load_pem_private_key,
            load_ssh_private_key,
        )
    except ImportError:
        raise ConfigError(
            "--ssh with key files needs the package cryptography",
            hint='install "offload-build[ssh]", or add the key to an agent and give --ssh default',
        ) from None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InvalidValueError(
            f"--ssh: failed to open {shown}: {(error.strerror or '').lower()}"
        ) from error
    load = load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in data else load_pem_private_key
    try:
        key = load(data, None)
    except TypeError:
        raise InvalidValueError(
            f"--ssh: the key in {shown} has a passphrase, which a build cannot ask for",
            hint=f"add it to your agent with `ssh-add {shown}` and give --ssh default",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidValueError(
            f"--ssh: failed to parse {shown}: it is neither a socket nor a private key"
        ) from None
    if isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        return key
    raise InvalidValueError(f"--ssh: {shown} has a kind of key that is not supported")


def public_blob(key: PrivateKey) -> bytes:
    """Return the public key as SSH writes it."""
    import base64

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return base64.b64decode(line.split()[1])


def signature(key: PrivateKey, data: bytes, flags: int) -> bytes:
    """Return a signature as SSH writes it.

    Args:
        key: signs.
        data: what is signed.
        flags: of the request; for RSA they choose the hash.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    if isinstance(key, rsa.RSAPrivateKey):
        name, algorithm = _rsa_hash(flags)
        return string(name) + string(key.sign(data, padding.PKCS1v15(), algorithm))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        size = key.curve.key_size
        chosen: HashAlgorithm = hashes.SHA512()
        if size <= 256:
            chosen = hashes.SHA256()
        elif size <= 384:
            chosen = hashes.SHA384()
        numbers = decode_dss_signature(key.sign(data, ec.ECDSA(chosen)))
        name = f"ecdsa-sha2-nistp{size}".encode()
        return string(name) + string(_integers(numbers))
    return string(b"ssh-ed25519") + string(key.sign(data))


def _rsa_hash(flags: int) -> tuple[bytes, HashAlgorithm]:
    from cryptography.hazmat.primitives import hashes

    if flags & _SHA512_FLAG:
        return b"rsa-sha2-512", hashes.SHA512()
    if flags & _SHA256_FLAG:
        return b"rsa-sha2-256", hashes.SHA256()
    return b"ssh-rsa", hashes.SHA1()  # noqa: S303 - what the protocol means by no flag


def _integers(numbers: Sequence[int]) -> bytes:
    # RFC 4251: as short as possible, with a zero in front of a set highest bit.
    encoded = (number.to_bytes(number.bit_length() // 8 + 1, "big") for number in numbers)
    return b"".join(string(number) for number in encoded)
