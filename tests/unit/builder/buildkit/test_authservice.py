"""Tokens for BuildKit, and the proof that two sessions may share them."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from offload_builder.buildkit.authservice import auth_services
from offload_builder.buildkit.h2.messages import PERMISSION_DENIED, GrpcError
from offload_builder.buildkit.providers import TokenAnswer, TokenDeniedError, TokenRequest
from offload_proto.buildkit import auth_pb2


class Source:
    """Knows one token."""

    def __init__(self, authority: bytes = b"a" * 32) -> None:
        self.authority = authority

    async def credentials(self, host: str) -> tuple[str, str]:
        return "user", f"secret of {host}"

    async def token(self, request: TokenRequest) -> TokenAnswer:
        if request.host != "r.example":
            raise TokenDeniedError("r.other refused your login")
        return TokenAnswer(f"{request.service} {request.scopes}", 60)


class Call:
    """One request on its way to a handler."""

    def __init__(self, request) -> None:
        self._request = request.SerializeToString()
        self.answer = b""

    async def receive_one(self) -> bytes:
        return self._request

    async def send(self, messages) -> None:
        (self.answer,) = messages


async def ask(source: Source, method: str, request, answer):
    call = Call(request)
    await auth_services(source)[f"/moby.filesync.v1.Auth/{method}"](call)
    return answer.FromString(call.answer)


async def public_key(source: Source, host: str, salt: bytes) -> bytes:
    request = auth_pb2.GetTokenAuthorityRequest(Host=host, Salt=salt)
    found = await ask(source, "GetTokenAuthority", request, auth_pb2.GetTokenAuthorityResponse)
    return found.PublicKey


async def verified(key: bytes, source: Source, host: str, salt: bytes) -> bool:
    request = auth_pb2.VerifyTokenAuthorityRequest(Host=host, Salt=salt, Payload=b"p" * 32)
    kind = auth_pb2.VerifyTokenAuthorityResponse
    signed = (await ask(source, "VerifyTokenAuthority", request, kind)).Signed
    assert signed[64:] == b"p" * 32
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signed[:64], signed[64:])
    except InvalidSignature:
        return False
    return True


async def test_sessions_of_one_build_share_tokens_and_others_do_not():
    key = await public_key(Source(), "r.example", b"salt")
    assert len(key) == 32
    assert await verified(key, Source(), "r.example", b"salt")
    assert not await verified(key, Source(b"b" * 32), "r.example", b"salt")
    assert not await verified(key, Source(), "other.example", b"salt")
    assert not await verified(key, Source(), "r.example", b"another daemon")


async def test_token_is_fetched_with_what_the_registry_asked_for():
    request = auth_pb2.FetchTokenRequest(
        ClientID="x", Host="r.example", Realm="https://t", Service="s", Scopes=["a", "b"]
    )
    found = await ask(Source(), "FetchToken", request, auth_pb2.FetchTokenResponse)
    assert (found.Token, found.ExpiresIn, found.IssuedAt) == ("s ('a', 'b')", 60, 0)


async def test_refused_token_is_an_error_that_ends_no_session():
    request = auth_pb2.FetchTokenRequest(Host="r.other")
    with pytest.raises(GrpcError, match=r"r\.other refused your login") as caught:
        await ask(Source(), "FetchToken", request, auth_pb2.FetchTokenResponse)
    assert caught.value.code == PERMISSION_DENIED
