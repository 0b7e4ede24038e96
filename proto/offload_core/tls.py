"""mTLS for gRPC: server and channel credentials, names in certificates, routing names.

The gateway has one public port; TLS server names route connections (RFC 6066, section 3):
`enroll.offload` is the enrolment service, `gateway.offload` the API, `NODE.node.offload` a node,
`PROJECT.buildkit.offload` BuildKit's API of a project at one of its nodes.
Identities are URIs in the subject alternative name: `offload://member/NAME?token=ID&role=ROLE`
and `offload://node/NAME?token=ID`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from offload_core.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cryptography import x509
    from grpc import aio

ENROLL_NAME = "enroll.offload"
GATEWAY_NAME = "gateway.offload"
NODE_SUFFIX = ".node.offload"
BUILDKIT_SUFFIX = ".buildkit.offload"

MAX_MESSAGE_BYTES = 16 << 20

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    # How long a connection may take to be made; 20 s unless said. Source: grpc_types.h.
    ("grpc.min_reconnect_backoff_ms", 8_000),
)

SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *CHANNEL_OPTIONS,
    # Without this a client that pings every 20 s is sent away after about two minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class KeyPair:
    """A certificate chain with its private key, PEM; `repr` never shows the key."""

    certificate_pem: bytes
    private_key_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        return "KeyPair(...)"


@dataclass(frozen=True)
class Identity:
    """Who a certificate speaks for."""

    kind: str
    """`member` or `node`."""
    name: str
    token_id: str
    role: str = ""

    def uri(self) -> str:
        """Return the URI for the subject alternative name."""
        return (
            f"offload://{self.kind}/{quote(self.name, safe='')}"
            f"?token={quote(self.token_id, safe='')}&role={quote(self.role, safe='')}"
        )

    @classmethod
    def parse(cls, uri: str) -> Identity | None:
        """Return the identity of a URI, None when it is not one of ours."""
        parts = urlsplit(uri)
        if parts.scheme != "offload" or parts.netloc not in ("member", "node"):
            return None
        query = parse_qs(parts.query)
        return cls(
            kind=parts.netloc,
            name=unquote(parts.path.lstrip("/")),
            token_id=query.get("token", [""])[0],
            role=query.get("role", [""])[0],
        )


def peer_identity(context: aio.ServicerContext[Any, Any]) -> Identity:
    """Return the identity in the peer's certificate, which TLS has already verified.

    Raises:
        AuthenticationError: there is no certificate of ours.
    """
    for value in context.auth_context().get("x509_subject_alternative_name", ()):
        identity = Identity.parse(value.decode("utf-8", "replace"))
        if identity is not None:
            return identity
    raise AuthenticationError("this call needs a client certificate; run: offload login")


def certificate_identity(certificate: x509.Certificate, now: datetime) -> Identity:
    """Return whom a certificate speaks for, whose signature was verified before.

    Raises:
        AuthenticationError: it is not valid now, or is none of ours.
    """
    from cryptography import x509

    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise AuthenticationError(
            f"the client certificate expired at {end:%Y-%m-%d %H:%M} UTC; run: offload login"
        )
    if now < begin:
        raise AuthenticationError(
            f"the client certificate is valid from {begin:%Y-%m-%d %H:%M} UTC on; check the clocks"
        )
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        names = None
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    for uri in uris:
        identity = Identity.parse(uri)
        if identity is not None:
            return identity
    raise AuthenticationError("the client certificate names no member; run: offload login")


def open_channel(
    address: str,
    server_name: str,
    *,
    ca_pem: bytes,
    keys: KeyPair | None = None,
    options: Sequence[tuple[str, Any]] = (),
) -> aio.Channel:
    """Return a channel to "HOST:PORT" that verifies `server_name`; nothing is dialled yet."""
    import grpc
    from grpc import aio

    credentials = grpc.ssl_channel_credentials(
        root_certificates=ca_pem,
        private_key=keys.private_key_pem if keys else None,
        certificate_chain=keys.certificate_pem if keys else None,
    )
    return aio.secure_channel(
        address,
        credentials,
        options=(
            *CHANNEL_OPTIONS,
            ("grpc.ssl_target_name_override", server_name),
            ("grpc.default_authority", server_name),
            *options,
        ),
    )
