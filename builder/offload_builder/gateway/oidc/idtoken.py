"""Verifies tokens of issuers: who signed, for whom, when, and that it says one thing only.

What a token asks the reader to fetch (`jku`, `x5u`, `jwk`, `x5c`) is never looked at: keys come
from the issuer that the configuration names. Sources: RFC 7515, RFC 7519, RFC 8725 (best
practices), OpenID Connect Core 1.0 (section 3.1.3.7).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt

from offload_builder.gateway.oidc.fetching import IssuerUnreachableError
from offload_builder.gateway.oidc.issuerkeys import IssuerKeys
from offload_builder.gateway.oidc.strictjson import StrictJsonError, parse_object
from offload_core.errors import AuthenticationError, GatewayUnreachableError

if TYPE_CHECKING:
    from offload_builder.gateway.oidc.issuerkeys import PublicKey
    from offload_builder.gateway.oidc.policy import Issuer, Policy

MAX_TOKEN_CHARACTERS = 16 << 10
MAX_KID = 256
MAX_JTI = 1000
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_HEADER_REFUSED = ("crit", "b64", "zip", "enc")


@dataclass(frozen=True)
class VerifiedToken:
    """A token that was verified.

    Attributes:
        issuer: that signed it.
        claims: what it says.
        use_key: names this token, also when its signature is written in another way.
        expires_at: seconds since 1970 UTC.
    """

    issuer: Issuer
    claims: dict[str, Any]
    use_key: str
    expires_at: float


class TokenVerifier:
    """Verifies by one policy; keeps the keys of issuers that stay as they are."""

    def __init__(self, policy: Policy) -> None:
        """Ask nothing yet."""
        self._policy = policy
        self._keys: dict[str, IssuerKeys] = {}

    def use(self, policy: Policy) -> None:
        """Take over another policy."""
        self._policy = policy
        self._keys = {
            url: keys for url, keys in self._keys.items() if policy.issuer_of(url) == keys.issuer
        }

    async def verify(self, token: str) -> VerifiedToken:
        """Return what a token says.

        Raises:
            AuthenticationError: it proves nothing here; the sentence says why.
            GatewayUnreachableError: the issuer's keys cannot be had.
        """
        token = token.strip()
        header, claims = _unverified(token)
        issuer = self._issuer(claims)
        algorithm = _algorithm(header, issuer)
        kid = _kid(header)
        keys = self._keys.setdefault(issuer.url, IssuerKeys(issuer))
        try:
            candidates = await keys.candidates(kid, algorithm)
        except IssuerUnreachableError as error:
            raise GatewayUnreachableError(
                f"the gateway cannot verify the token: the issuer {issuer.url} {error}"
            ) from error
        if not candidates:
            raise _refused(
                f"its key is not among those that {issuer.url} publishes for {algorithm}"
            )
        # In a thread: a signature of the slowest kind takes milliseconds.
        await asyncio.to_thread(_check, token, candidates, algorithm, issuer)
        _check_times(claims, issuer)
        _check_audience(claims, issuer)
        return VerifiedToken(issuer, claims, _use_key(token, claims), float(claims["exp"]))

    def _issuer(self, claims: dict[str, Any]) -> Issuer:
        url = claims.get("iss")
        issuer = self._policy.issuer_of(url) if isinstance(url, str) else None
        if issuer is None:
            raise _refused(f"the gateway takes none of the issuer {str(url)[:200]!a}")
        return issuer


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise _refused(f"it has more than {MAX_TOKEN_CHARACTERS} characters")
    if _SHAPE.fullmatch(token) is None:
        raise _refused("it does not have three parts with dots between them")
    header, claims, _ = token.split(".")
    try:
        return _part(header, "the header"), _part(claims, "the text of its claims")
    except StrictJsonError as error:
        raise _refused(str(error)) from error


def _part(text: str, what: str) -> dict[str, Any]:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:
        raise StrictJsonError(f"{what} is not base64url") from error
    return parse_object(data, what)


def _algorithm(header: dict[str, Any], issuer: Issuer) -> str:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
        raise _refused(
            f"its algorithm {str(algorithm)[:20]!a} is none of {', '.join(issuer.algorithms)}"
        )
    for name in _HEADER_REFUSED:
        if name in header:
            raise _refused(f"its header has {name}, which changes how it is read")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":
        raise _refused(f"it is of the type {str(kind)[:40]!a}, not an identity token")
    return algorithm


def _kid(header: dict[str, Any]) -> str | None:
    if "kid" not in header:
        return None
    kid = header["kid"]
    if not isinstance(kid, str) or not kid or len(kid) > MAX_KID:
        raise _refused("the name of its key is no text, or too long")
    return kid


def _check(token: str, candidates: list[PublicKey], algorithm: str, issuer: Issuer) -> None:
    failure: jwt.PyJWTError | None = None
    for key in candidates:
        try:
            jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=issuer.url,
                audience=list(issuer.audiences),
                leeway=issuer.clock_skew,
                options={"require": ["iss", "sub", "aud", "exp", "iat"]},
            )
        except jwt.InvalidSignatureError as error:
            failure = error
        except jwt.PyJWTError as error:
            raise _refused(_reason(error, issuer)) from error
        else:
            return
    raise _refused("its signature is not that of its issuer") from failure


def _reason(error: jwt.PyJWTError, issuer: Issuer) -> str:
    """Return why a token is refused, in words of ours: the library's may repeat the token."""
    match error:
        case jwt.ExpiredSignatureError():
            return "it has expired"
        case jwt.ImmatureSignatureError():
            return "it is not valid yet; the clocks of gateway and issuer may differ"
        case jwt.InvalidAudienceError():
            return f"it was made for another service, not for {', '.join(issuer.audiences)}"
        case jwt.MissingRequiredClaimError():
            return f"it has no {error.claim}"
        case _:
            return f"it is not valid ({type(error).__name__})"


def _check_times(claims: dict[str, Any], issuer: Issuer) -> None:
    times = {}
    for name in ("exp", "iat", "nbf"):
        value = claims.get(name)
        if value is None and name == "nbf":
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (math.isfinite(value) and 0 <= value < 1 << 40)
        ):
            raise _refused(f"its {name} is not a time")
        times[name] = float(value)
    if times["exp"] <= times["iat"]:
        raise _refused("it ends before it begins")
    age = time.time() - times["iat"]
    if age > issuer.max_token_age + issuer.clock_skew:
        raise _refused(f"it was made {age / 60:.0f} minutes ago, which is too old here")


def _check_audience(claims: dict[str, Any], issuer: Issuer) -> None:
    audience = claims["aud"]
    others = set(audience if isinstance(audience, list) else [audience]) - set(issuer.audiences)
    # Whoever else may receive this token could use it here.
    if others and not (issuer.client_id and claims.get("azp") == issuer.client_id):
        raise _refused("it was made for other services as well")
    if issuer.client_id and claims.get("azp", issuer.client_id) != issuer.client_id:
        raise _refused("it was made for another client of its issuer")


def _use_key(token: str, claims: dict[str, Any]) -> str:
    """Return what makes a token one: its jti, else what was signed.

    Not the signature: an ECDSA signature can be written in two ways without its key.
    """
    jti = claims.get("jti")
    own = isinstance(jti, str) and 0 < len(jti) <= MAX_JTI
    what = f"jti\n{jti}" if own else f"text\n{token.rpartition('.')[0]}"
    return hashlib.sha256(f"{claims['iss']}\n{what}".encode()).hexdigest()


def _refused(why: str) -> AuthenticationError:
    return AuthenticationError(f"the token of the identity provider is refused: {why}")
