"""Access tokens: their text, their hash at rest and the rules for using them.

A token is `ofl_<id>_<secret>_<fingerprint>`. The id is public and names the record, the secret has
256 random bits, the fingerprint is the beginning of the SHA-256 of the CA certificate, so that a
first login can verify the gateway. A plain SHA-256 of the secret is enough at rest: there is
nothing to guess in 256 random bits that a slow hash would protect.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_core.errors import AccessDeniedError, AuthenticationError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

FINGERPRINT_CHARS = 32
MAX_USES = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")

_TOKEN = re.compile(r"ofl_([a-z2-7]{12})_([a-z2-7]{52})_([a-f0-9]{32})")
_NEW_TOKEN_HINT = "ask an administrator for a new token"  # noqa: S105 - a sentence


def random_id() -> str:
    """Return 12 lower-case base32 characters, 60 random bits."""
    return _base32(secrets.token_bytes(8))[:12]


def role_name(role: int) -> str:
    """Return a role as people write it, for example `member`."""
    return identity_pb.Role.Name(identity_pb.Role.ValueType(role)).removeprefix("ROLE_").lower()


def role_from_name(name: str) -> identity_pb.Role.ValueType:
    """Return the role behind a name.

    Raises:
        UsageError: there is no such role.
    """
    known = [role_name(value) for value in identity_pb.Role.values() if value]
    if name not in known:
        raise UsageError(f'there is no role "{name}"; roles are {", ".join(known)}')
    return identity_pb.Role.Value(f"ROLE_{name.upper()}")


@dataclass(frozen=True)
class TokenText:
    """The parts of a token as it was printed; `repr` shows the public one only."""

    token_id: str
    secret: str = field(repr=False)
    fingerprint: str = field(repr=False)

    def __str__(self) -> str:
        return f"ofl_{self.token_id}_***"

    def reveal(self) -> str:
        """Return the whole token; for the one place that shows it."""
        return f"ofl_{self.token_id}_{self.secret}_{self.fingerprint}"

    @classmethod
    def generate(cls, ca_fingerprint: str) -> TokenText:
        """Return a new token for the CA with this fingerprint."""
        return cls(
            token_id=random_id(),
            secret=_base32(secrets.token_bytes(32)),
            fingerprint=ca_fingerprint[:FINGERPRINT_CHARS],
        )

    @classmethod
    def parse(cls, text: str) -> TokenText:
        """Return the parts of a token.

        Raises:
            AuthenticationError: the text is not a token; it is not repeated in the sentence.
        """
        match = _TOKEN.fullmatch(text.strip())
        if match is None:
            raise AuthenticationError(
                "this is not a token of offload-build: it must look like ofl_ID_SECRET_FINGERPRINT",
                hint="copy the whole token, it is one word without spaces",
            )
        return cls(match[1], match[2], match[3])

    def secret_hash(self) -> str:
        """Return what is stored instead of the secret."""
        return hashlib.sha256(self.secret.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class TokenRecord:
    """A token as it is stored. Times are UTC."""

    token_id: str
    secret_hash: str = field(repr=False)
    name: str
    role: identity_pb.Role.ValueType
    project_ids: tuple[str, ...]
    """Projects that may be used; empty for all."""
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
    identity: bytes = b""
    """A serialised ExternalIdentity, of a login with an identity provider's token."""
    max_uses: int | None = None
    """How many nodes it may enrol; None for any number."""
    enrolled_with: str = ""
    """Token of a node's enrolment; empty for tokens and logins themselves."""

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything."""
        return self.role == identity_pb.ROLE_ADMIN

    @property
    def is_node(self) -> bool:
        """Whether it belongs to nodes."""
        return self.role == identity_pb.ROLE_NODE

    @property
    def family(self) -> str:
        """The token that stands behind it: that of an enrolment, else its own id."""
        return self.enrolled_with or self.token_id

    def check_holds(self, now: datetime) -> None:
        """Refuse a certificate whose token is over.

        A node's token is for enrolment: its end is not the end of the nodes that it enrolled.

        Raises:
            AuthenticationError: it was revoked, or has expired.
        """
        if self.is_node:
            self.check_not_revoked()
        else:
            self.check_usable(now)

    def check_usable(self, now: datetime) -> None:
        """Refuse a token that is over.

        Raises:
            AuthenticationError: it was revoked or has expired.
        """
        self.check_not_revoked()
        if self.expires_at is not None and self.expires_at <= now:
            raise AuthenticationError(
                f'the token {self.token_id} of "{self.name}" expired '
                f"on {self.expires_at:%Y-%m-%d %H:%M} UTC",
                hint=_NEW_TOKEN_HINT,
            )

    def check_not_revoked(self) -> None:
        """Refuse a token that was revoked.

        Raises:
            AuthenticationError: it was.
        """
        if self.revoked_at is not None:
            raise AuthenticationError(
                f'the token {self.token_id} of "{self.name}" was revoked '
                f"on {self.revoked_at:%Y-%m-%d %H:%M} UTC",
                hint=_NEW_TOKEN_HINT,
            )

    def may_use(self, project_id: str) -> bool:
        """Return whether the token opens a project."""
        return self.is_admin or not self.project_ids or project_id in self.project_ids

    def check_project(self, project_id: str) -> None:
        """Refuse a project that the token does not open, whether it exists or not.

        Raises:
            AccessDeniedError: with the projects that it opens.
        """
        if not self.may_use(project_id):
            raise AccessDeniedError(
                f'"{self.name}" may not use the project "{project_id}", only '
                f"{', '.join(self.project_ids)}"
            )


def new_record(
    text: TokenText,
    *,
    name: str,
    role: identity_pb.Role.ValueType,
    project_ids: Iterable[str],
    expires_at: datetime | None,
    now: datetime,
    max_uses: int | None = None,
) -> TokenRecord:
    """Return the record of a token that was just generated.

    Raises:
        UsageError: the name, the role or the end cannot be used.
    """
    if NAME.fullmatch(name) is None:
        raise UsageError(
            f'"{name[:80]}" cannot be the name of a token: up to 64 letters, digits and . _ @ + -'
        )
    if role not in identity_pb.Role.values() or role == identity_pb.ROLE_UNSPECIFIED:
        raise UsageError("a token needs a role: admin, member, ci, untrusted or node")
    if expires_at is not None and expires_at <= now:
        raise UsageError("the end of a token must lie in the future")
    if max_uses is not None and role != identity_pb.ROLE_NODE:
        raise UsageError("only tokens of the role node have a number of uses")
    if max_uses is not None and not 0 <= max_uses <= MAX_USES:
        raise UsageError(f"a token has 1 to {MAX_USES} uses, or 0 for any number")
    if max_uses is None and role == identity_pb.ROLE_NODE:
        max_uses = 1
    return TokenRecord(
        token_id=text.token_id,
        secret_hash=text.secret_hash(),
        name=name,
        role=role,
        project_ids=tuple(sorted(set(project_ids))),
        created_at=now,
        expires_at=expires_at,
        max_uses=max_uses or None,
    )


def verify(
    text: TokenText,
    record: TokenRecord | None,
    *,
    ca_fingerprints: Sequence[str],
    now: datetime,
) -> TokenRecord:
    """Return the record that a token proves.

    Raises:
        AuthenticationError: another gateway's token, unknown, wrong, revoked or expired.
    """
    if text.fingerprint not in [item[:FINGERPRINT_CHARS] for item in ca_fingerprints]:
        raise AuthenticationError(
            "this token was made by another gateway",
            hint="check the gateway's address, or ask its administrator for a token",
        )
    expected = record.secret_hash if record is not None else "0" * 64
    # The comparison also runs for an unknown id, so that time does not tell the two apart.
    matches = hmac.compare_digest(text.secret_hash(), expected)
    if record is None or not matches:
        raise AuthenticationError("the gateway does not know this token", hint=_NEW_TOKEN_HINT)
    record.check_usable(now)
    return record


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode("ascii").rstrip("=").lower()
