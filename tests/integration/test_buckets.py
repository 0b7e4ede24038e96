"""Who a node is in the bucket, and how it gets there, on a real MinIO."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import pytest
import urllib3
from aiohttp import web
from minio import Minio, MinioAdmin
from minio.credentials import AssumeRoleProvider, StaticProvider
from minio.credentials.credentials import Credentials

from offload_builder.node.config import NodeConfig
from offload_cache.health import StoreHealth
from offload_cache.s3credentials import RenewedCredentials
from offload_cache.s3store import S3Config, S3Store
from offload_core.errors import CacheUnavailableError, ConfigError, NotFoundError
from tests.fixtures.authority import Authority
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DOCS = Path(__file__).resolve().parents[2] / "docs"
BUCKET = "offload-cache"
KMS = base64.b64encode(b"k" * 32).decode()


def documented_policy() -> dict[str, object]:
    """Return the policy that docs/cache.md gives, for our bucket and the prefix "pool"."""
    text = (DOCS / "cache.md").read_text("utf-8")
    found = re.search(r"<!-- policy:.*?```json\n(.*?)```", text, re.DOTALL)
    assert found is not None
    policy: dict[str, object] = json.loads(
        found[1].replace("BUCKET", BUCKET).replace("PREFIX", "pool")
    )
    return policy


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority")
    Authority(folder).issue("minio")
    return folder


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    environment = {"MINIO_KMS_SECRET_KEY": f"team-key:{KMS}", "MINIO_DOMAIN": "s3.test"}
    with MinioServer(tmp_path_factory.mktemp("minio"), environment=environment) as server:
        client = Minio(server.endpoint_url[7:], server.access_key, server.secret_key, secure=False)
        client.make_bucket(BUCKET)
        admin = MinioAdmin(
            endpoint=server.endpoint_url[7:], secure=False,
            credentials=StaticProvider(server.access_key, server.secret_key),
        )  # fmt: skip
        admin.policy_add("node", policy=documented_policy())
        admin.user_add("node-key", "node-secret-key")
        admin.attach_policy(["node"], user="node-key")
        yield server


@pytest.fixture(scope="module")
def secure_minio(
    tmp_path_factory: pytest.TempPathFactory, authority: Path
) -> Iterator[MinioServer]:
    with MinioServer(
        tmp_path_factory.mktemp("secure"),
        certificate=(authority / "minio.pem", authority / "minio-key.pem"),
        environment={"MINIO_KMS_SECRET_KEY": f"team-key:{KMS}"},
    ) as server:
        yield server


def config(minio: MinioServer, **changes: object) -> S3Config:
    values: dict[str, object] = {
        "endpoint_url": minio.endpoint_url, "bucket": BUCKET, "access_key": minio.access_key,
        "secret_key": minio.secret_key, "prefix": f"pool/{os.urandom(4).hex()}",
        "read_seconds": 2.0, "write_seconds": 3.0,
    }  # fmt: skip
    return S3Config(**{**values, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def opened(config: S3Config) -> AsyncIterator[S3Store]:
    store = S3Store(config, health=StoreHealth("s3", pause_seconds=0.1))
    try:
        yield store
    finally:
        await store.close()


async def use_everything(store: S3Store, folder: Path) -> None:
    """Do everything that a node does with the shared store."""
    data = os.urandom(20 << 20)
    (folder / "large").write_bytes(data)
    await store.write_bytes("a/one", b"1")
    assert await store.write_file("a/b/large", folder / "large") == len(data)
    got = bytearray()
    assert await store.read("a/b/large", got.extend) == len(data)
    assert got == data
    assert await store.read_bytes("a/one", max_bytes=10) == b"1"
    info = await store.stat("a/b/large")
    assert info is not None
    assert info.size_bytes == len(data)
    # What is not there is not there, and no refusal.
    assert await store.stat("a/none") is None
    for _ in range(4):
        with pytest.raises(NotFoundError):
            await store.read_bytes("a/none", max_bytes=10)
    assert [info.key for info in await store.list_objects("a/", limit=10)] == ["a/b/large", "a/one"]
    assert await store.list_folders("a/") == ["a/b/"]
    assert await store.create_bytes("a/lock", b"me")
    assert not await store.create_bytes("a/lock", b"you")
    await store.delete("a/one")
    await store.delete_many(["a/lock", "a/b/large", "a/none"])
    assert await store.list_objects("", limit=10) == []
    assert store.state == "the shared cache is reachable"


async def test_the_documented_policy_allows_all_a_node_does(
    minio: MinioServer, tmp_path: Path
) -> None:
    keys = {"access_key": "node-key", "secret_key": "node-secret-key"}
    async with opened(config(minio, **keys)) as store:
        await use_everything(store, tmp_path)


async def test_the_documented_policy_allows_nothing_outside_the_prefix(minio: MinioServer) -> None:
    async with opened(config(minio, prefix="other")) as store:
        await store.write_bytes("k", b"theirs")
    keys = {"access_key": "node-key", "secret_key": "node-secret-key"}
    for prefix in ("other", "", "pool2", "poo"):
        async with opened(config(minio, prefix=prefix, **keys)) as store:
            key = "k" if prefix else "other/k"
            for call in (
                store.read_bytes(key, max_bytes=10), store.stat(key), store.write_bytes(key, b"x"),
                store.list_objects("", limit=1), store.list_folders(""), store.delete(key),
                store.delete_many([key]), store.create_bytes(key + "2", b"x"),
            ):  # fmt: skip
                with pytest.raises(CacheUnavailableError, match=r"refused|did not remove"):
                    await call
    client = Minio(minio.endpoint_url[7:], *keys.values(), secure=False)
    for forbidden in (
        lambda: client.make_bucket("mine"),
        lambda: client.set_bucket_policy(BUCKET, "{}"),
        lambda: client.remove_bucket(BUCKET),
        lambda: list(client.list_objects(BUCKET, recursive=True)),
        lambda: list(client.list_objects(BUCKET, prefix="other/")),
    ):
        with pytest.raises(Exception, match="AccessDenied"):
            forbidden()
    async with opened(config(minio, prefix="other")) as store:
        assert await store.read_bytes("k", max_bytes=10) == b"theirs"


async def test_tls_with_an_authority_of_ones_own(
    secure_minio: MinioServer, authority: Path, tmp_path: Path
) -> None:
    async with opened(config(secure_minio, ca_file=authority / "ca.pem")) as store:
        await use_everything(store, tmp_path)
    async with opened(config(secure_minio)) as store:
        with pytest.raises(CacheUnavailableError, match=r"no secure connection .*s3_ca"):
            await store.stat("k")
    async with opened(config(secure_minio, verify_tls=False)) as store:
        assert await store.stat("k") is None


async def test_objects_are_encrypted_as_asked(
    minio: MinioServer, secure_minio: MinioServer, authority: Path, tmp_path: Path
) -> None:
    asked = config(minio, encryption="s3")
    async with opened(asked) as store:
        await store.write_bytes("small", b"x")
        (tmp_path / "large").write_bytes(os.urandom(9 << 20))
        await store.write_file("large", tmp_path / "large")
        await store.create_bytes("created", b"x")
    client = Minio(minio.endpoint_url[7:], minio.access_key, minio.secret_key, secure=False)
    for name in ("small", "large", "created"):
        headers = client.stat_object(BUCKET, f"{asked.prefix}/{name}").metadata
        assert headers["x-amz-server-side-encryption"] == "AES256"
    asked = config(secure_minio, encryption="kms", kms_key="team-key", ca_file=authority / "ca.pem")
    async with opened(asked) as store:
        await use_everything(store, tmp_path)
        await store.write_bytes("small", b"x")
        pool = urllib3.PoolManager(ssl_context=asked.tls_context())
        client = Minio(
            secure_minio.endpoint_url[8:], secure_minio.access_key, secure_minio.secret_key,
            http_client=pool,
        )  # fmt: skip
        headers = client.stat_object(BUCKET, f"{asked.prefix}/small").metadata
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"].endswith("team-key")
        pool.clear()


async def test_virtual_hosts(
    minio: MinioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def local(host: str, *rest: object, **more: object) -> object:
        if host.endswith("s3.test"):
            asked.append(host)
            host = "127.0.0.1"
        return resolve(host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", local)
    url = f"http://s3.test:{minio.port}"
    async with opened(config(minio, endpoint_url=url, addressing="virtual")) as store:
        await use_everything(store, tmp_path)
    assert set(asked) == {f"{BUCKET}.s3.test"}


async def test_an_assumed_role_is_narrowed_by_its_policy(
    minio: MinioServer, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(documented_policy()))
    narrowed = config(minio, credentials="assume-role", session_policy=policy)
    async with opened(narrowed) as store:
        await use_everything(store, tmp_path)
    async with opened(replace(narrowed, prefix="other")) as store:
        with pytest.raises(CacheUnavailableError, match="refused"):
            await store.write_bytes("k", b"x")
    async with opened(replace(narrowed, secret_key="wrong")) as store:
        with pytest.raises(CacheUnavailableError, match=r"gives no keys .*HTTP status 403"):
            await store.stat("k")


class _ShortRole(AssumeRoleProvider):
    """Real temporary keys of MinIO that are said to end soon; the shortest real ones last 900 s."""

    seconds = 2.0
    calls = 0

    def retrieve(self) -> Credentials:
        type(self).calls += 1
        found = super().retrieve()
        return Credentials(
            found.access_key, found.secret_key, found.session_token,
            datetime.utcnow() + timedelta(seconds=self.seconds),  # noqa: DTZ003 - as minio does
        )  # fmt: skip


async def test_temporary_keys_are_renewed_before_their_end(minio: MinioServer) -> None:
    def role() -> _ShortRole:
        return _ShortRole(
            sts_endpoint=minio.endpoint_url,
            access_key=minio.access_key,
            secret_key=minio.secret_key,
        )

    keys = RenewedCredentials(role, "the STS")
    first = keys.retrieve()
    assert keys.retrieve() is first
    await asyncio.sleep(1.6)  # a quarter of their life is left
    second = keys.retrieve()
    assert second.access_key != first.access_key
    assert _ShortRole.calls == 2
    # An STS that fails does not end keys that are still good.
    role_of = keys._make
    keys._make = lambda: (_ for _ in ()).throw(OSError("away"))
    await asyncio.sleep(1.6)
    assert keys.retrieve() is second
    await asyncio.sleep(0.5)
    with pytest.raises(CacheUnavailableError, match="the STS gives no keys"):
        keys.retrieve()
    keys._make = role_of
    assert keys.retrieve().access_key not in {first.access_key, second.access_key}


@pytest.mark.parametrize("known", [True, False], ids=["ended", "forgotten"])
async def test_keys_that_the_store_calls_ended_are_renewed_at_once(
    minio: MinioServer, tmp_path: Path, known: bool
) -> None:
    asked = config(minio, credentials="assume-role")
    async with opened(asked) as store:
        await store.write_bytes("k", b"x")
        provider = store._reading._provider
        good = provider.retrieve()
        key = good.access_key if known else good.access_key[::-1]
        bad = Credentials(key, good.secret_key, "not-a-token", good.expiration)
        provider._current = bad
        assert await store.read_bytes("k", max_bytes=1) == b"x"
        assert provider.retrieve() != bad
    ended = replace(config(minio), session_token="not-a-token")
    async with opened(ended) as store:
        with pytest.raises(CacheUnavailableError, match=r"session token .*give new keys"):
            await store.read_bytes("k", max_bytes=1)


@asynccontextmanager
async def key_service(minio: MinioServer) -> AsyncIterator[tuple[str, list[str]]]:
    """Give MinIO's own temporary keys as an STS with web identity, and as a container does."""
    asked: list[str] = []
    real = AssumeRoleProvider(
        sts_endpoint=minio.endpoint_url, access_key=minio.access_key, secret_key=minio.secret_key
    )

    async def sts(request: web.Request) -> web.Response:
        query = {name: values[0] for name, values in parse_qs(request.query_string).items()}
        asked.append(query["Action"])
        if query["WebIdentityToken"] != "good-token":
            return web.Response(status=400, text="<Error/>")
        keys = await asyncio.to_thread(real.retrieve)
        return web.Response(
            text='<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{keys.access_key}</AccessKeyId>"
            f"<SecretAccessKey>{keys.secret_key}</SecretAccessKey>"
            f"<SessionToken>{keys.session_token}</SessionToken>"
            "<Expiration>2100-01-01T00:00:00Z</Expiration></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )

    async def container(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Authorization", ""))
        keys = await asyncio.to_thread(real.retrieve)
        return web.json_response(
            {
                "AccessKeyId": keys.access_key, "SecretAccessKey": keys.secret_key,
                "Token": keys.session_token, "Expiration": "2100-01-01T00:00:00Z",
            }
        )  # fmt: skip

    application = web.Application()
    application.router.add_post("/", sts)
    application.router.add_get("/keys", container)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


async def test_a_web_identity_is_exchanged_and_its_token_is_never_told(
    minio: MinioServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("bad-token-9876")
    async with key_service(minio) as (url, asked):
        way = config(
            minio, access_key="", secret_key="", credentials="web-identity",
            web_identity_token_file=token, sts_endpoint=url, role_arn="arn:aws:iam::1:role/node",
        )  # fmt: skip
        async with opened(way) as store:
            with pytest.raises(CacheUnavailableError, match="HTTP status 400") as caught:
                await store.stat("k")
            assert "9876" not in str(caught.value) + store.state + capsys.readouterr().out
            token.write_text("good-token\n")
            async with asyncio.timeout(10):
                while True:
                    with suppress(CacheUnavailableError):
                        assert await store.stat("k") is None
                        break
                    await asyncio.sleep(0.05)
    assert set(asked) == {"AssumeRoleWithWebIdentity"}


async def test_keys_of_the_aws_environment(
    minio: MinioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    way = config(minio, access_key="", secret_key="", credentials="aws")
    async with key_service(minio) as (url, asked):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/keys")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "container-token")
        async with opened(way) as store:
            assert await store.stat("k") is None
        assert asked == ["container-token"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", minio.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", minio.secret_key)
        async with opened(way) as store:
            assert await store.stat("k") is None
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"s3_credentials": "magic"}, 's3_credentials "magic" is unknown'),
        ({"s3_credentials": "aws"}, "s3_access_key has no use"),
        ({"s3_access_key": ""}, "needs s3_access_key and s3_secret_key"),
        ({"s3_role_arn": "arn:x"}, 's3_role_arn needs s3_credentials "assume-role"'),
        ({"s3_credentials": "assume-role", "s3_session_token": "x"}, "s3_session_token needs"),
        (
            {"s3_credentials": "web-identity", "s3_access_key": "", "s3_secret_key": ""},
            "needs s3_web_identity_token_file",
        ),
        ({"s3_encryption": "kms"}, "needs s3_kms_key"),
        ({"s3_encryption": "kms", "s3_kms_key": "k"}, "with https"),
        ({"s3_kms_key": "k"}, 'needs s3_encryption "kms"'),
        ({"s3_addressing": "odd"}, "use one of auto, path, virtual"),
        (
            {"s3_endpoint": "https://h", "s3_bucket": "a.bucket", "s3_addressing": "virtual"},
            "a dot in s3_bucket",
        ),
        ({"s3_endpoint": "https://h", "s3_ca": Path("/none/ca.pem")}, "cannot read s3_ca"),
        ({"s3_endpoint": "https://h", "s3_ca": Path("/etc/hostname")}, "no certificates in PEM"),
        (
            {"s3_endpoint": "https://h", "s3_ca": Path("/etc/hostname"), "s3_verify_tls": False},
            "set one of them",
        ),
        ({"s3_endpoint": "http://h/path"}, "without a path"),
        ({"s3_credentials": "assume-role", "s3_sts_endpoint": "sts"}, "s3_sts_endpoint is no URL"),
        (
            {"s3_credentials": "assume-role", "s3_session_policy": Path("/etc/hostname")},
            "is no JSON",
        ),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    options: dict[str, object], sentence: str
) -> None:
    values: dict[str, object] = {
        "gateway": "g:1", "s3_endpoint": "http://h", "s3_access_key": "name",
        "s3_secret_key": "secret-value",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        NodeConfig(**{**values, **options})  # type: ignore[arg-type]
    assert sentence in caught.value.message
    assert "secret-value" not in caught.value.message
    assert "\n" not in caught.value.message
