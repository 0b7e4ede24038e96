"""The session service that logs in at registries.

Source: BuildKit's session/auth and util/resolver/authorizer.go. The daemon asks for a key that
stands for the login at a registry, and then for tokens; the login itself it never sees. Only
registries without a token service need it, and are served by Credentials.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from offload_builder.buildkit.h2.messages import PERMISSION_DENIED, GrpcError
from offload_builder.buildkit.providers import TokenDeniedError, TokenRequest
from offload_proto.buildkit.auth_pb2 import (
    CredentialsRequest,
    CredentialsResponse,
    FetchTokenRequest,
    FetchTokenResponse,
    GetTokenAuthorityRequest,
    GetTokenAuthorityResponse,
    VerifyTokenAuthorityRequest,
    VerifyTokenAuthorityResponse,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.providers import CredentialSource

_SERVICE = "/moby.filesync.v1.Auth/"


def auth_services(source: CredentialSource) -> dict[str, Callable[[ServerCall], Awaitable[None]]]:
    """Return the handlers of the Auth service by method name."""
    return {
        f"{_SERVICE}Credentials": lambda call: _credentials(call, source),
        f"{_SERVICE}FetchToken": lambda call: _fetch_token(call, source),
        f"{_SERVICE}GetTokenAuthority": lambda call: _authority(call, source),
        f"{_SERVICE}VerifyTokenAuthority": lambda call: _verify(call, source),
    }


async def _credentials(call: ServerCall, source: CredentialSource) -> None:
    request = CredentialsRequest.FromString(await call.receive_one())
    username, secret = await source.credentials(request.Host)
    answer = CredentialsResponse(Username=username, Secret=secret)
    await call.send([answer.SerializeToString()])


async def _fetch_token(call: ServerCall, source: CredentialSource) -> None:
    request = FetchTokenRequest.FromString(await call.receive_one())
    wish = TokenRequest(request.Host, request.Realm, request.Service, tuple(request.Scopes))
    try:
        found = await source.token(wish)
    except TokenDeniedError as error:
        # Not an error of the build yet: BuildKit may do without, as with a cache to import.
        raise GrpcError(PERMISSION_DENIED, str(error)) from error
    answer = FetchTokenResponse(Token=found.token, ExpiresIn=found.life_seconds)
    await call.send([answer.SerializeToString()])


async def _authority(call: ServerCall, source: CredentialSource) -> None:
    request = GetTokenAuthorityRequest.FromString(await call.receive_one())
    public = _key(source, request.Host, request.Salt).public_key()
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    await call.send([GetTokenAuthorityResponse(PublicKey=raw).SerializeToString()])


async def _verify(call: ServerCall, source: CredentialSource) -> None:
    request = VerifyTokenAuthorityRequest.FromString(await call.receive_one())
    signature = _key(source, request.Host, request.Salt).sign(request.Payload)
    answer = VerifyTokenAuthorityResponse(Signed=signature + request.Payload)
    await call.send([answer.SerializeToString()])


def _key(source: CredentialSource, host: str, salt: bytes) -> Ed25519PrivateKey:
    """Return the key for a registry; it is good for one life of a daemon only."""
    seed = hmac.digest(source.authority, host.encode() + b"\0" + salt, "sha256")
    return Ed25519PrivateKey.from_private_bytes(seed)
