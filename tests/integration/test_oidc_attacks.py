"""Tokens that must not open the gateway: a real issuer, a real gateway, one attack per test."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time

import pytest
from cryptography.hazmat.primitives import serialization

from offload_builder.gateway.oidc import fetching, issuerkeys
from offload_core.errors import AccessDeniedError, AuthenticationError, GatewayUnreachableError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from tests.fixtures.identityprovider import IdentityProvider, SigningKey
from tests.fixtures.oidcgateway import RULES, OidcGateway


@pytest.fixture
async def pool():
    async with OidcGateway() as running:
        yield running


def encoded(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def refused_for(error, words: str) -> bool:
    return isinstance(error, AuthenticationError) and words in error.message


async def test_a_good_token_is_taken(pool):
    reply = await pool.exchange(pool.provider.token())
    assert reply.member.startswith("ci+project-app+")
    assert (reply.role, reply.identity.rule) == (identity_pb.ROLE_CI, "project app")


async def test_algorithm_none(pool):
    for name in ("none", "None", "NONE", ""):
        token = f"{encoded({'alg': name, 'kid': 'key-1'})}.{encoded(pool.provider.claims())}."
        assert refused_for(await pool.refusal(token), "algorithm")


async def test_signature_is_missing(pool):
    token = pool.provider.token().rpartition(".")[0] + "."
    assert refused_for(await pool.refusal(token), "signature")


async def test_hmac_with_the_public_key(pool):
    public = pool.provider.key.private.public_key()
    forms = [
        public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        json.dumps(pool.provider.key.jwk()).encode(),
    ]
    for secret in forms:
        text = f"{encoded({'alg': 'HS256', 'kid': 'key-1'})}.{encoded(pool.provider.claims())}"
        signature = hmac.new(secret, text.encode(), hashlib.sha256).digest()
        assert refused_for(await pool.refusal(f"{text}.{encoded(signature)}"), "algorithm")


async def test_key_of_the_attacker_under_the_name_of_a_published_one(pool):
    token = pool.provider.token(key=SigningKey("key-1"))
    assert refused_for(await pool.refusal(token), "signature")


async def test_changed_claims(pool):
    head, _, signature = pool.provider.token().split(".")
    forged = f"{head}.{encoded(pool.provider.claims(sub='project:other'))}.{signature}"
    assert refused_for(await pool.refusal(forged), "signature")


@pytest.mark.parametrize("audience", ["another.service", "", [], ["a", "b"], None, 7])
async def test_wrong_audience(pool, audience):
    assert isinstance(await pool.refusal(pool.provider.token(aud=audience)), AuthenticationError)


async def test_audience_that_others_share(pool):
    token = pool.provider.token(aud=["offload.test", "another.service"])
    assert refused_for(await pool.refusal(token), "other services")


@pytest.mark.parametrize("ending", ["/", "/x", "@evil.example", "#", "?"])
async def test_wrong_issuer(pool, ending):
    token = pool.provider.token(iss=pool.provider.url + ending)
    assert refused_for(await pool.refusal(token), "none of the issuer")


async def test_issuer_that_is_no_text(pool):
    for issuer in (None, 7, [pool.provider.url], {"url": pool.provider.url}):
        token = f"{encoded({'alg': 'RS256'})}.{encoded(pool.provider.claims(iss=issuer))}.AAAA"
        assert refused_for(await pool.refusal(token), "none of the issuer")


async def test_another_issuer_signs_for_ours(pool):
    async with IdentityProvider() as other:
        token = other.token(iss=pool.provider.url)
    assert refused_for(await pool.refusal(token), "signature")


async def test_expired(pool):
    now = int(time.time())
    token = pool.provider.token(iat=now - 600, nbf=None, exp=now - 100)
    assert refused_for(await pool.refusal(token), "expired")


async def test_not_yet_valid(pool):
    now = int(time.time())
    for changes in ({"nbf": now + 120}, {"iat": now + 120}):
        assert refused_for(await pool.refusal(pool.provider.token(**changes)), "not valid yet")


async def test_clocks_may_differ_up_to_the_bound_and_no_further():
    async with OidcGateway(further='clock_skew = "30s"') as pool:
        now = int(time.time())
        for changes in (
            {"iat": now - 300, "nbf": None, "exp": now - 20},
            {"iat": now + 20, "nbf": now + 20},
        ):
            await pool.exchange(pool.provider.token(**changes))
        for changes in (
            {"iat": now - 300, "nbf": None, "exp": now - 40},
            {"iat": now + 50, "nbf": None},
            {"nbf": now + 50},
        ):
            assert isinstance(
                await pool.refusal(pool.provider.token(**changes)), AuthenticationError
            )


@pytest.mark.parametrize("name", ["exp", "iat", "sub"])
async def test_claim_is_missing(pool, name):
    assert refused_for(await pool.refusal(pool.provider.token(**{name: None})), name)


@pytest.mark.parametrize("value", ["9999999999", True, 1e300, -1, [1]])
async def test_end_that_is_no_time(pool, value):
    assert isinstance(await pool.refusal(pool.provider.token(exp=value)), AuthenticationError)


async def test_token_that_was_made_too_long_ago():
    async with OidcGateway(further='max_token_age = "1h"') as pool:
        token = pool.provider.token(iat=int(time.time()) - 3 * 3600, nbf=None)
        assert refused_for(await pool.refusal(token), "too old")


async def test_replay_where_a_token_is_good_for_one_login():
    async with OidcGateway(further='replay = "once"') as pool:
        token = pool.provider.token()
        await pool.exchange(token)
        assert refused_for(await pool.refusal(token), "already used")
        # The same statement signed anew, and with another body behind the same jti.
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        assert refused_for(await pool.refusal(pool.provider.token(**claims)), "already used")
        again = pool.provider.token(**claims | {"nonce": "x"})
        assert refused_for(await pool.refusal(again), "already used")
        await pool.gateway.stop()
        await pool.gateway.start()
        assert refused_for(await pool.refusal(token), "already used")


async def test_replay_with_the_other_form_of_an_elliptic_signature():
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    async with OidcGateway(further='replay = "once"') as pool:
        key = SigningKey.elliptic("key-2")
        pool.provider.published.append(key.jwk())
        token = pool.provider.token(key=key, jti=None)
        await pool.exchange(token)
        text, _, signature = token.rpartition(".")
        data = base64.urlsafe_b64decode(signature + "==")
        other = order - int.from_bytes(data[32:], "big")
        twin = f"{text}.{encoded(data[:32] + other.to_bytes(32, 'big'))}"
        assert twin != token
        assert refused_for(await pool.refusal(twin), "already used")


async def test_repeated_token_gives_the_same_login_and_none_after_revocation(pool):
    token = pool.provider.token()
    first, second = await pool.exchange(token), await pool.exchange(token)
    stub = await pool.identity_stub(first)
    assert first.member == second.member
    records = await pool.gateway.gateway._members.external.list()
    assert len(records) == 1
    admin = await pool.gateway.admin()
    await admin.RevokeToken(identity_pb.RevokeTokenRequest(token_id=records[0].token_id),
                            metadata=(await _metadata()))  # fmt: skip
    assert refused_for(await pool.refusal(token), "was revoked")
    with pytest.raises(Exception, match="was revoked"):
        await stub.WhoAmI(identity_pb.WhoAmIRequest(), metadata=await _metadata())


async def _metadata():
    from offload_core.versions import call_metadata

    return call_metadata()


async def test_unknown_key_asks_the_issuer_again_but_not_for_each_token(pool):
    await pool.exchange(pool.provider.token())
    asked = pool.provider.key_requests()
    for number in range(20):
        token = pool.provider.token(key=SigningKey.elliptic(f"unknown-{number}"))
        assert refused_for(await pool.refusal(token), "not among those")
    assert pool.provider.key_requests() - asked <= 1


async def test_rotated_key(pool, monkeypatch):
    monkeypatch.setattr(issuerkeys, "AGAIN_SECONDS", 0.0)
    await pool.exchange(pool.provider.token())
    old = pool.provider.rotate("key-2")
    await pool.exchange(pool.provider.token())
    # The new keys have replaced the old ones, so the withdrawn key is of no use any more.
    assert refused_for(await pool.refusal(pool.provider.token(key=old)), "not among those")


@pytest.mark.parametrize(
    "kid",
    ["../../etc/passwd", "key-1\x00", "key-1' OR '1'='1", "http://127.0.0.1/keys", "", "k" * 999],
)
async def test_name_of_the_key_is_a_path_or_a_query(pool, kid):
    token = pool.provider.token(headers={"kid": kid}, key=SigningKey("key-1"))
    assert isinstance(await pool.refusal(token), AuthenticationError)
    assert set(pool.provider.requests) <= {"/.well-known/openid-configuration", "/keys"}


async def test_name_of_the_key_is_no_text(pool):
    for kid in (7, None, ["key-1"], {"kid": "key-1"}):
        head = encoded({"alg": "RS256", "kid": kid})
        token = f"{head}.{encoded(pool.provider.claims())}.AAAA"
        assert refused_for(await pool.refusal(token), "name of its key")


@pytest.mark.parametrize("name", ["jku", "x5u"])
async def test_token_that_names_where_its_key_lies(pool, name):
    async with IdentityProvider() as evil:
        key = SigningKey("key-1")
        evil.published = [key.jwk()]
        token = pool.provider.token(key=key, headers={name: f"{evil.url}/keys"})
        assert refused_for(await pool.refusal(token), "signature")
        assert evil.requests == []


async def test_token_that_brings_its_key_along(pool):
    key = SigningKey("key-1")
    token = pool.provider.token(key=key, headers={"jwk": key.jwk(), "x5c": ["AAAA"]})
    assert refused_for(await pool.refusal(token), "signature")


@pytest.mark.parametrize(
    ("name", "value"), [("crit", ["exp"]), ("b64", False), ("zip", "DEF"), ("enc", "A128GCM")]
)
async def test_header_that_changes_how_the_token_is_read(pool, name, value):
    head = encoded({"alg": "RS256", "kid": "key-1", name: value})
    token = f"{head}.{encoded(pool.provider.claims())}.AAAA"
    assert refused_for(await pool.refusal(token), name)


async def test_token_of_another_kind(pool):
    for kind in ("at+jwt", "logout+jwt", "JOSE", 7):
        head = encoded({"alg": "RS256", "kid": "key-1", "typ": kind})
        token = f"{head}.{encoded(pool.provider.claims())}.AAAA"
        assert refused_for(await pool.refusal(token), "of the type")


async def test_key_that_is_published_for_encryption(pool):
    for change in ({"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "RS512"}, {"kty": "EC"}):
        pool.provider.published = [pool.provider.key.jwk() | change]
        await pool.gateway.stop()
        await pool.gateway.start()
        assert refused_for(await pool.refusal(pool.provider.token()), "not among those")


async def test_secret_key_among_the_published_ones(pool):
    secret = secrets.token_bytes(32)
    pool.provider.published = [{"kty": "oct", "k": encoded(secret), "kid": "key-1"}]
    text = f"{encoded({'alg': 'HS256', 'kid': 'key-1'})}.{encoded(pool.provider.claims())}"
    signature = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    assert refused_for(await pool.refusal(f"{text}.{encoded(signature)}"), "algorithm")


async def test_short_key(pool):
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = SigningKey("weak", rsa.generate_private_key(65537, 1024))
    pool.provider.published = [weak.jwk()]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = pool.provider.token(key=weak)
    assert refused_for(await pool.refusal(token), "not among those")


async def test_token_without_the_name_of_its_key_when_there_are_several(pool):
    pool.provider.published.append(SigningKey("key-2").jwk())
    token = pool.provider.token(headers={"kid": None})
    assert refused_for(await pool.refusal(token), "not among those")


async def test_claims_that_are_there_twice(pool):
    claims = json.dumps(pool.provider.claims())[:-1] + ', "sub": "project:other"}'
    text = f"{encoded({'alg': 'RS256', 'kid': 'key-1'})}.{encoded(claims.encode())}"
    import jwt

    signature = jwt.get_algorithm_by_name("RS256").sign(text.encode(), pool.provider.key.private)
    error = await pool.refusal(f"{text}.{encoded(signature)}")
    assert refused_for(error, "'sub' twice")


async def test_header_with_two_algorithms(pool):
    head = encoded(b'{"alg":"none","alg":"RS256","kid":"key-1"}')
    token = f"{head}.{encoded(pool.provider.claims())}.AAAA"
    assert refused_for(await pool.refusal(token), "'alg' twice")


@pytest.mark.parametrize(
    "token",
    ["", "x", "a.b", "a.b.c.d", "a.b.c", "....", "e30.e30.", "\x00.\x00.\x00", "ä.ö.ü"],
)
async def test_rubbish(pool, token):
    assert isinstance(await pool.refusal(token), AuthenticationError)


async def test_huge_token(pool):
    token = pool.provider.token(filling="x" * 20_000)
    assert refused_for(await pool.refusal(token), "characters")


async def test_deeply_nested_claims(pool):
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    token = f"{encoded({'alg': 'RS256'})}.{encoded(deep[:9000])}.AAAA"
    assert isinstance(await pool.refusal(token), AuthenticationError)
    nested: dict[str, object] = {}
    for _ in range(20):
        nested = {"a": nested}
    assert refused_for(await pool.refusal(pool.provider.token(more=nested)), "nested")


async def test_issuer_that_is_slow(pool, monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.3)
    pool.provider.delay_seconds = 5.0
    began = time.monotonic()
    error = await pool.refusal(pool.provider.token())
    assert isinstance(error, GatewayUnreachableError)
    assert "does not answer within" in error.message
    assert time.monotonic() - began < 3.0


async def test_issuer_that_sends_without_end(pool):
    pool.provider.padding = "x" * (1 << 20)
    error = await pool.refusal(pool.provider.token())
    assert isinstance(error, GatewayUnreachableError)
    assert "more than 256 KiB" in error.message


async def test_issuer_that_redirects(pool):
    pool.provider.redirect_keys_to = f"{pool.provider.url}/elsewhere"
    error = await pool.refusal(pool.provider.token())
    assert "status 302" in error.message
    assert "/elsewhere" not in pool.provider.requests


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://other.example"},
        {"jwks_uri": "http://keys.example/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": ["x"]},
    ],
)
async def test_discovery_document_that_lies(pool, changes):
    pool.provider.discovery_changes = changes
    assert isinstance(await pool.refusal(pool.provider.token()), GatewayUnreachableError)


async def test_keys_are_used_on_while_the_issuer_is_away(pool, monkeypatch):
    await pool.exchange(pool.provider.token())
    monkeypatch.setattr(issuerkeys, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(issuerkeys, "AGAIN_SECONDS", 0.0)
    pool.provider.discovery_changes = {"issuer": "away"}
    await pool.exchange(pool.provider.token())
    monkeypatch.setattr(issuerkeys, "STALE_SECONDS", 0.0)
    assert isinstance(await pool.refusal(pool.provider.token()), GatewayUnreachableError)


async def test_no_rule_matches(pool):
    error = await pool.refusal(pool.provider.token(sub="project:other"))
    assert isinstance(error, AccessDeniedError)
    assert "no identity rule" in error.message


async def test_gateway_without_rules_takes_nothing():
    async with OidcGateway(identity_file=None) as pool:
        (pool.gateway.directory / "identity.toml").unlink()
        await pool.gateway.stop()
        await pool.gateway.start()
        error = await pool.refusal(pool.provider.token())
        assert "takes no tokens" in error.message


async def test_token_that_comes_many_times_at_once_opens_once():
    async with OidcGateway(further='replay = "once"') as pool:
        token = pool.provider.token()
        answers = await asyncio.gather(
            *(pool.exchange(token) for _ in range(20)), return_exceptions=True
        )
        refused = [item for item in answers if isinstance(item, AuthenticationError)]
        assert (len(refused), len(answers)) == (19, 20)
        # One request for the description and one for the keys, whatever comes in meanwhile.
        assert len(pool.provider.requests) == 2


async def test_rule_with_a_wildcard_covers_no_neighbour():
    rules = RULES.replace("project:app", "project:acme/*")
    async with OidcGateway(rules=rules) as pool:
        await pool.exchange(pool.provider.token(sub="project:acme/app"))
        for subject in (
            "project:acme-evil/app",
            "project:acme/app/sub",
            "project:acme/app:ref:main",
            "Project:acme/app",
            "xproject:acme/app",
            "project:acme",
            "project:evil/acme/app",
        ):
            assert isinstance(
                await pool.refusal(pool.provider.token(sub=subject)), AccessDeniedError
            )
