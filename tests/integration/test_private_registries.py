"""Private registries with real token and password logins, on real nodes."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

import pytest

from offload_builder.node import registrywatch
from offload_proto.v1 import node_service_pb2 as node_pb
from tests.fixtures.cutrelay import CutRelay
from tests.fixtures.node import NodePool
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.registrybuilds import build, write_registries
from tests.fixtures.tokenserver import IDENTITY, TokenServer
from tests.fixtures.upstreams import make_certificate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

SCRATCH = "FROM scratch\nCOPY busybox /bin/busybox\n"
TRUE = 'RUN ["/bin/busybox", "true"]\n'
DENIED = node_pb.Failure.KIND_REGISTRY_AUTH


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens") as server:
        yield server


@pytest.fixture
def registry(tmp_path: Path, tokens: TokenServer) -> Iterator[DockerRegistry]:
    """A registry that believes the token server."""
    with DockerRegistry(tmp_path / "registry", auth=tokens.auth) as running:
        yield running


@pytest.fixture
def simple(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A registry with a password file."""
    with DockerRegistry(tmp_path / "simple") as running:
        yield running


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


def noise() -> dict[str, tuple[bytes, int]]:
    return {f"n{i}": (random.Random(i).randbytes(3 << 20), 0o644) for i in range(4)}


def pool_login(folder: Path, host: str, *lines: str) -> Path:
    (folder / "password").write_text(PASSWORD)
    login = [f'username = "{USER}"', f'password_file = "{folder / "password"}"']
    return write_registries(folder, host, "http = true", *login, *lines)


async def test_person_pushes_and_pulls_with_tokens_that_the_node_fetches(pool, registry, tokens):
    await pool.start_node()
    host = registry.address
    logins = {host: (USER, PASSWORD)}
    built = await build(pool, SCRATCH, push=f"{host}/team/app:1", logins=logins)
    assert built.good, built.failure
    assert {item.user for item in tokens.asked} == {USER}
    assert any("repository:team/app:pull,push" in item.scopes for item in tokens.asked)
    # Asked with the repository, before the end of the build, and once.
    assert built.person.asked == [(host, "team/app")]
    built = await build(pool, f"FROM {host}/team/app:1\n{TRUE}", logins=logins)
    assert built.good, built.failure


async def test_identity_token_is_exchanged_and_never_given_to_buildkit(pool, registry, tokens):
    await pool.start_node()
    logins = {registry.address: ("", IDENTITY)}
    built = await build(pool, SCRATCH, push=f"{registry.address}/team/app:1", logins=logins)
    assert built.good, built.failure
    assert {(item.method, item.user) for item in tokens.asked} == {("POST", USER)}


async def test_token_service_that_wants_a_form_gets_the_password_there(pool, registry, tokens):
    tokens.get_works = False
    await pool.start_node()
    logins = {registry.address: (USER, PASSWORD)}
    built = await build(pool, SCRATCH, push=f"{registry.address}/team/app:1", logins=logins)
    assert built.good, built.failure


async def test_login_for_a_part_of_a_registry_is_used_there_only(pool, registry, tokens):
    tokens.users = {"shop": "s1", "team": "t1"}
    tokens.rights = {"shop": ("shop/",), "team": ("team/",)}
    await pool.start_node()
    host = registry.address
    logins = {f"{host}/shop/app": ("shop", "s1"), host: ("team", "t1")}
    for name, user in (("shop/app", "shop"), ("team/app", "team")):
        tokens.asked.clear()
        built = await build(pool, SCRATCH, push=f"{host}/{name}:1", logins=logins)
        assert built.good, built.failure
        assert {item.user for item in tokens.asked if f"{name}:pull,push" in str(item.scopes)} == {
            user
        }


@pytest.mark.parametrize(
    ("login", "words"),
    [
        (
            (USER, "wrong"),
            "refused your login as ali for team/app: log in again with `docker login",
        ),
        (("", ""), "needs a login and there is none: use `docker login"),
    ],
)
@pytest.mark.parametrize("kind", ["registry", "simple"])
async def test_wrong_or_no_login_says_what_to_do_at_once(pool, request, kind, login, words):
    server = request.getfixturevalue(kind)
    await pool.start_node()
    await build(pool, SCRATCH)
    built = await build(
        pool, SCRATCH, push=f"{server.address}/team/app:1", logins={server.address: login}
    )
    assert built.failure.kind == DENIED
    message = built.failure.message
    assert words.replace("team/app", "team/app" if kind == "registry" else "this image") in message
    assert server.address in message
    assert "wrong" not in message
    assert len(message.splitlines()[-1]) < 300
    assert built.seconds < 3


async def test_tokens_are_renewed_in_the_middle_of_a_long_push(pool, registry, tokens):
    tokens.life_seconds = 2
    await pool.start_node()
    with CutRelay(registry.address) as slow:
        slow.rate = 3 << 20
        files = noise()
        dockerfile = SCRATCH + "".join(f"COPY {name} /\n" for name in files)
        built = await build(
            pool,
            dockerfile,
            push=f"{slow.address}/team/app:1",
            logins={slow.address: (USER, PASSWORD)},
            files=files,
        )
    assert built.good, built.failure
    assert built.seconds > tokens.life_seconds
    pushes = [item for item in tokens.asked if "team/app:pull,push" in str(item.scopes)]
    assert len(pushes) >= 2


@pytest.mark.parametrize("through_the_cache", [False, True])
async def test_tokens_are_renewed_in_the_middle_of_a_long_pull(
    pool, registry, tokens, tmp_path, through_the_cache
):
    await pool.start_node("one")
    with CutRelay(registry.address) as slow:
        host, files = slow.address, noise()
        logins = {host: (USER, PASSWORD)}
        dockerfile = SCRATCH + "".join(f"COPY {name} /\n" for name in files)
        built = await build(pool, dockerfile, push=f"{host}/team/app:1", logins=logins, files=files)
        assert built.good, built.failure
        await pool.stop_node("one")
        config = pool_login(tmp_path, host) if through_the_cache else None
        await pool.start_node("two", registry_config=config)
        tokens.asked.clear()
        tokens.life_seconds, slow.delay = 1, 0.3
        logins = {} if through_the_cache else logins
        built = await build(pool, f"FROM {host}/team/app:1\n{TRUE}", logins=logins)
    assert built.good, built.failure
    assert len([item for item in tokens.asked if item.user]) >= 2


async def test_token_that_ends_before_its_time_is_replaced(pool, registry, tokens):
    tokens.life_seconds, tokens.claimed_seconds = 1, 300
    await pool.start_node()
    with CutRelay(registry.address) as slow:
        slow.rate = 3 << 20
        files = noise()
        built = await build(
            pool,
            SCRATCH + "".join(f"COPY {name} /\n" for name in files),
            push=f"{slow.address}/team/app:1",
            logins={slow.address: (USER, PASSWORD)},
            files=files,
        )
    assert built.good, built.failure


async def test_pool_pushes_where_the_administrator_allows_it_and_nowhere_else(
    pool, registry, tokens, tmp_path
):
    host = registry.address
    config = pool_login(tmp_path, host, 'repositories = ["team/*"]', 'push = ["team/app"]')
    await pool.start_node(registry_config=config)
    built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
    assert built.good, built.failure
    for name in ("team/other", "private/app"):
        tokens.asked.clear()
        built = await build(pool, SCRATCH, push=f"{host}/{name}:1")
        assert built.failure.kind == DENIED, name
        assert not any("push" in str(item.scopes) for item in tokens.asked if item.user)


async def test_pool_reads_only_the_repositories_of_its_patterns(pool, registry, tokens, tmp_path):
    host = registry.address
    tokens.rights = {}
    await pool.start_node("seed")
    logins = {host: (USER, PASSWORD)}
    for name in ("team/base", "secret/base"):
        built = await build(pool, SCRATCH, push=f"{host}/{name}:1", logins=logins)
        assert built.good, built.failure
    await pool.stop_node("seed")
    config = pool_login(tmp_path, host, 'repositories = ["team/**"]')
    await pool.start_node("two", registry_config=config)
    built = await build(pool, f"FROM {host}/team/base:1\n{TRUE}")
    assert built.good, built.failure
    tokens.asked.clear()
    built = await build(pool, f"FROM {host}/secret/base:1\n{TRUE}")
    assert built.failure.kind == DENIED
    assert not [item for item in tokens.asked if item.user]


async def test_password_registry_gets_the_pools_login_only_when_it_is_for_everything(
    pool, simple, tmp_path
):
    host = simple.address
    limited = pool_login(tmp_path, host, 'push = ["team/*"]')
    await pool.start_node("limited", registry_config=limited)
    built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
    assert built.failure.kind == DENIED
    assert "cannot limit a login; log in yourself" in built.failure.message
    await pool.stop_node("limited")
    whole = pool_login(tmp_path, host, 'push = ["**"]')
    await pool.start_node("whole", registry_config=whole)
    built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
    assert built.good, built.failure


async def test_pools_login_that_cannot_be_read_is_named(pool, registry, tmp_path):
    host = registry.address
    config = pool_login(tmp_path, host, 'push = ["**"]')
    await pool.start_node(registry_config=config)
    (tmp_path / "password").unlink()
    built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
    assert built.failure.kind == DENIED
    assert "the pool's login for" in built.failure.message
    assert "No such file or directory; log in yourself" in built.failure.message


async def test_own_login_comes_before_the_pools_for_a_push(pool, registry, tokens, tmp_path):
    tokens.users["eva"] = "e1"
    config = pool_login(tmp_path, registry.address, 'push = ["**"]')
    await pool.start_node(registry_config=config)
    name = f"{registry.address}/team/app:1"
    built = await build(pool, SCRATCH, push=name, logins={registry.address: ("eva", "e1")})
    assert built.good, built.failure
    assert {item.user for item in tokens.asked} == {"eva"}
    built = await build(pool, SCRATCH, push=name, logins={registry.address: ("eva", "no")})
    assert "refused your login as eva" in built.failure.message


async def test_registry_that_refuses_connections_is_named_at_once(pool):
    await pool.start_node()
    await build(pool, SCRATCH)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        built = await build(pool, f"FROM {host}/team/base:1\nRUN x\n")
        assert f"{host} is down or not reachable" in built.failure.message
        assert built.seconds < 3
        built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
        assert f"{host} is down or not reachable" in built.failure.message
        assert built.seconds < 3


async def test_silent_registry_is_told_of_at_once_and_given_up(pool, monkeypatch):
    monkeypatch.setattr(registrywatch, "GIVE_UP_SECONDS", 4.0)
    await pool.start_node()
    await build(pool, SCRATCH)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        for dockerfile, push in ((f"FROM {host}/x:1\nRUN x\n", ""), (SCRATCH, f"{host}/x:1")):
            built = await build(pool, dockerfile, push=push)
            (at, text) = built.person.notices[0]
            assert f"the registry {host} has not answered" in text
            assert at - built.began < 2.5
            assert "has not answered" in built.failure.message
            assert built.seconds < 9


async def test_silent_token_service_is_told_of(pool, registry, tokens, monkeypatch):
    monkeypatch.setattr("offload_cache.mirror.connection.HEADER_SECONDS", 3.0)
    tokens.silent = True
    await pool.start_node()
    built = await build(
        pool, SCRATCH, push=f"{registry.address}/a:1", logins={registry.address: (USER, PASSWORD)}
    )
    assert any("token service" in text for _, text in built.person.notices)
    assert "was not possible" in built.failure.message


async def test_unknown_authority_is_named_and_a_configured_one_is_trusted(pool, tmp_path, tokens):
    certificate, key, _ = make_certificate(tmp_path / "tls")
    with DockerRegistry(tmp_path / "tls-registry", tls=(certificate, key), auth={}) as server:
        host = server.address
        # Without a table BuildKit speaks plain HTTP on loopback.
        config = write_registries(tmp_path, host, "http = false")
        await pool.start_node("one", registry_config=config)
        built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
        assert f"the node does not trust the certificate of {host}" in built.failure.message
        assert built.seconds < 4
        await pool.stop_node("one")
        config = write_registries(tmp_path, host, f'ca = ["{certificate}"]')
        await pool.start_node("two", registry_config=config)
        built = await build(pool, SCRATCH, push=f"{host}/team/app:1")
        assert built.good, built.failure
