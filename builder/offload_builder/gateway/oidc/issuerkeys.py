"""The public keys of one issuer: discovered, kept for a while, asked for again when one is new.

Sources: OpenID Connect Discovery 1.0 (section 4), RFC 7517 (JWK), RFC 7518 (section 6).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from offload_builder.gateway.oidc.fetching import IssuerUnreachableError, fetch_json
from offload_core.errors import ConfigError
from offload_core.weburls import check_web_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.gateway.oidc.policy import Issuer

log = structlog.get_logger(__name__)

KEEP_SECONDS = 600.0
"""A key that its issuer has withdrawn is taken at most this long."""

STALE_SECONDS = 86_400.0
"""Without an answer of the issuer, keys are used up to this age."""

AGAIN_SECONDS = 10.0
"""An issuer is asked at most this often, whatever tokens come in."""

MAX_KEYS = 100
MIN_RSA_BITS = 2048

_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_DISCOVERY = "/.well-known/openid-configuration"

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True)
class _Keys:
    keys: tuple[dict[str, Any], ...]
    fetched_at: float


class IssuerKeys:
    """Keys of one issuer; one request to it at a time."""

    def __init__(
        self,
        issuer: Issuer,
        *,
        fetch: Callable[..., Awaitable[dict[str, Any]]] = fetch_json,
    ) -> None:
        """Ask nothing yet."""
        self.issuer = issuer
        self._fetch = fetch
        self._held: _Keys | None = None
        self._asked_at = float("-inf")
        self._trouble = ""
        self._lock = asyncio.Lock()

    async def candidates(self, kid: str | None, algorithm: str) -> list[PublicKey]:
        """Return the keys that may have made a signature, none when there are none.

        Args:
            kid: name of the key in the token; without one the issuer must have exactly one key
                for the algorithm.
            algorithm: an allowed one.

        Raises:
            IssuerUnreachableError: the issuer was never reached, or not for a day.
        """
        held = await self._current(KEEP_SECONDS)
        found = _matching(held.keys, kid, algorithm)
        if not found and (kid is not None or not held.keys):
            # Perhaps the issuer has a new key.
            held = await self._current(0.0)
            found = _matching(held.keys, kid, algorithm)
        if kid is None and len(found) > 1:
            return []
        return found

    async def _current(self, most_age: float) -> _Keys:
        async with self._lock:
            now = asyncio.get_running_loop().time()
            held = self._held
            fresh = held is not None and now - held.fetched_at < most_age
            if not fresh and now - self._asked_at >= AGAIN_SECONDS:
                self._asked_at = now
                await self._ask(now)
            held = self._held
            if held is None or now - held.fetched_at > STALE_SECONDS:
                raise IssuerUnreachableError(self._trouble or "does not answer")
            return held

    async def _ask(self, now: float) -> None:
        issuer = self.issuer
        try:
            url = issuer.jwks_url or await self._discover()
            document = await self._fetch(url, ca_file=issuer.ca_file)
            keys = document.get("keys")
            if not isinstance(keys, list) or len(keys) > MAX_KEYS:
                raise IssuerUnreachableError("publishes no list of keys")
        except IssuerUnreachableError as error:
            self._trouble = str(error)
            log.warning("identity.keys.failed", issuer=issuer.url, error=str(error))
            return
        usable = tuple(item for item in keys if isinstance(item, dict) and not _refused(item))
        self._held, self._trouble = _Keys(usable, now), ""
        log.info("identity.keys.fetched", issuer=issuer.url, keys=len(usable), of=len(keys))

    async def _discover(self) -> str:
        issuer = self.issuer
        document = await self._fetch(issuer.url.rstrip("/") + _DISCOVERY, ca_file=issuer.ca_file)
        # Otherwise one issuer could speak for another (Discovery, section 4.3).
        if document.get("issuer") != issuer.url:
            raise IssuerUnreachableError("publishes a discovery document of another issuer")
        url = document.get("jwks_uri")
        try:
            return check_web_url(url if isinstance(url, str) else "")
        except ConfigError as error:
            raise IssuerUnreachableError("names no https URL for its keys") from error


def _refused(key: dict[str, Any]) -> bool:
    """Return whether a key cannot be one for signatures: a secret one, or made for else."""
    operations = key.get("key_ops")
    return (
        key.get("kty") not in ("RSA", "EC", "OKP")
        or "d" in key
        or key.get("use", "sig") != "sig"
        or (operations is not None and (not isinstance(operations, list)
            or "verify" not in operations))
    )  # fmt: skip


def _matching(keys: tuple[dict[str, Any], ...], kid: str | None, algorithm: str) -> list[PublicKey]:
    found = []
    for key in keys:
        if kid is not None and key.get("kid") != kid:
            continue
        if key.get("alg", algorithm) != algorithm:
            continue
        public = _public_key(key, algorithm)
        if public is not None:
            found.append(public)
    return found


def _public_key(key: dict[str, Any], algorithm: str) -> PublicKey | None:
    """Return the key when its type is the algorithm's and it is strong enough, else None."""
    family = "OKP" if algorithm == "EdDSA" else "EC" if algorithm in _CURVES else "RSA"
    if key.get("kty") != family:
        return None
    if family == "EC" and key.get("crv") != _CURVES[algorithm]:
        return None
    if family == "OKP" and key.get("crv") != "Ed25519":
        return None
    try:
        public = jwt.PyJWK(key, algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(public, rsa.RSAPublicKey):
        return public if public.key_size >= MIN_RSA_BITS else None
    return (
        public
        if isinstance(public, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey))
        else None
    )
