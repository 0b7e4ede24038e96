"""First contact: the CA of a gateway, pinned by the fingerprint that every token carries.

A token is `ofl_<id>_<secret>_<fingerprint>`; the fingerprint is the first 32 hex characters of
the SHA-256 of the CA's DER certificate. So one copied text is enough for a safe first contact:
nobody in between can offer another CA.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

from offload_core.errors import AuthenticationError, ConfigError, GatewayUnreachableError
from offload_core.tls import ENROLL_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509

CONNECT_SECONDS = 10.0
FINGERPRINT_CHARACTERS = 32
MAX_PORT = 65_535
MIN_LINKED = 3
"""Certificates that a server shows at least when its CA has followed another one."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32,64}")
_ADDRESS = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:/\[\]@]+))(?::(?P<port>[0-9]{1,5})?)?"
)


def split_address(address: str, *, default_port: int = 7443) -> tuple[str, int]:
    """Return host and port of "HOST:PORT", "https://HOST:PORT" or "HOST".

    Raises:
        ConfigError: it is none of these.
    """
    text = address.strip().removeprefix("https://").rstrip("/")
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"] or 0) > MAX_PORT:
        raise ConfigError(f'"{address}" is not an address; write https://HOST:PORT')
    return match["v6"] or match["host"], int(match["port"] or default_port)


def join_address(host: str, port: int) -> str:
    """Return "HOST:PORT", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def token_fingerprint(token: str) -> str:
    """Return the CA fingerprint of a token.

    Raises:
        AuthenticationError: the text is no token of ours.
    """
    parts = token.strip().split("_")
    if len(parts) < 4 or parts[0] != "ofl" or len(parts[-1]) != FINGERPRINT_CHARACTERS:
        raise AuthenticationError(
            "this is not a token of an offload gateway; "
            "copy the whole text that 'offload-builder token create' printed"
        )
    return parts[-1]


async def fetch_pinned_ca(address: str, token: str) -> bytes:
    """Return the PEM of the gateway's CA after checking it against the token.

    Raises:
        AuthenticationError: not a token, or the gateway has another CA.
        GatewayUnreachableError: nothing answers at the address.
    """
    return await fetch_ca(
        address, token_fingerprint(token), named="the one that this token was made for"
    )


def check_fingerprint(text: str) -> str:
    """Return the fingerprint of a CA in the form in which it is compared.

    Args:
        text: 32 to 64 hexadecimal characters, with or without colons and "sha256:".

    Raises:
        ConfigError: it is none.
    """
    plain = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if _FINGERPRINT.fullmatch(plain) is None:
        raise ConfigError(
            f'"{text[:80]}" is not the fingerprint of a CA: 32 to 64 hexadecimal characters',
            hint="'offload-builder identity show' prints it",
        )
    return plain


async def fetch_ca(address: str, fingerprint: str, *, named: str = "the one you expect") -> bytes:
    """Return the PEM of the gateway's CA after comparing its SHA-256 with a fingerprint.

    When that CA was replaced since, the successors that it has vouched for come with it.

    Args:
        address: of the gateway.
        fingerprint: at least the first 32 hexadecimal characters.
        named: who should answer, for the sentence.

    Raises:
        AuthenticationError: the gateway has another CA.
        ConfigError: the fingerprint is none.
        GatewayUnreachableError: nothing answers at the address.
    """
    fingerprint = check_fingerprint(fingerprint)
    host, port = split_address(address)
    try:
        chain = await asyncio.to_thread(_peer_chain, host, port)
    except (OSError, ssl.SSLError) as error:
        raise GatewayUnreachableError(
            f"no gateway answers at {address}: {getattr(error, 'strerror', None) or error}",
            hint="check the address, and that 'offload-builder gateway' or 'up' runs there",
        ) from error
    for der in chain:
        if hashlib.sha256(der).hexdigest().startswith(fingerprint):
            found = successors(der, chain) if len(chain) > MIN_LINKED else [der]
            return "".join(ssl.DER_cert_to_PEM_cert(item) for item in found).encode()
    raise AuthenticationError(
        f"the gateway at {address} is not {named} (its CA has another fingerprint)"
    )


def successors(root_der: bytes, chain: Sequence[bytes]) -> list[bytes]:
    """Return a CA and those that have followed it, the newest first.

    A CA that is replaced signs a link: a certificate of a CA with name and key of its successor.

    Args:
        root_der: certificate that is trusted, DER.
        chain: what a server has shown, DER; only what the links prove is taken from it.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding

    certificates = [x509.load_der_x509_certificate(der) for der in chain]

    def signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    found = [x509.load_der_x509_certificate(root_der)]
    for trusted in found:
        for link in certificates:
            if not signed(link, trusted) or not _is_authority(link):
                continue
            for other in certificates:
                same = other.public_key() == link.public_key() and other.subject == link.subject
                if same and signed(other, other) and other not in found:
                    found.append(other)
    return [item.public_bytes(Encoding.DER) for item in reversed(found)]


def _is_authority(certificate: x509.Certificate) -> bool:
    from cryptography import x509

    try:
        rights = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, x509.ExtensionNotFound):
        return False
    return rights.value.ca


def fingerprints(ca_pem: bytes) -> tuple[str, ...]:
    """Return the SHA-256 of each certificate in a PEM text, 64 hexadecimal characters each."""
    ends = ca_pem.decode("ascii").split("-----END CERTIFICATE-----")
    texts = [f"{text.strip()}\n-----END CERTIFICATE-----\n" for text in ends if text.strip()]
    return tuple(hashlib.sha256(ssl.PEM_cert_to_DER_cert(text)).hexdigest() for text in texts)


def _peer_chain(host: str, port: int) -> list[bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is known yet to verify against; the caller compares the fingerprint.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=CONNECT_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname=ENROLL_NAME) as connection,
    ):
        # Public from Python 3.13 on; before that only the inner object has it.
        holder: Any = connection
        if not hasattr(holder, "get_unverified_chain"):
            holder = holder._sslobj
        return [_der(item) for item in holder.get_unverified_chain()]


def _der(certificate: Any) -> bytes:
    if isinstance(certificate, bytes):
        return certificate
    # The inner object gives its own type, whose PEM is public.
    return ssl.PEM_cert_to_DER_cert(certificate.public_bytes())
