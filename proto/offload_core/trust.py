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
from typing import Any

from offload_core.errors import AuthenticationError, ConfigError, GatewayUnreachableError
from offload_core.tls import ENROLL_NAME

CONNECT_SECONDS = 10.0
FINGERPRINT_CHARACTERS = 32
MAX_PORT = 65_535
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
    fingerprint = token_fingerprint(token)
    host, port = split_address(address)
    try:
        chain = await asyncio.to_thread(_peer_chain, host, port)
    except (OSError, ssl.SSLError) as error:
        raise GatewayUnreachableError(
            f"no gateway answers at {address}: {getattr(error, 'strerror', None) or error}",
            hint="check the address, and that 'offload-builder gateway' or 'up' runs there",
        ) from error
    for der in chain:
        if hashlib.sha256(der).hexdigest()[:FINGERPRINT_CHARACTERS] == fingerprint:
            return ssl.DER_cert_to_PEM_cert(der).encode()
    raise AuthenticationError(
        f"the gateway at {address} is not the one that this token was made for "
        "(its CA has another fingerprint)"
    )


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
