"""Builders in a real buildx that has never seen a BuildKit; and renewals that fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from offload_client.buildx import builders
from offload_client.buildx.registration import Registration
from offload_client.buildx.renewal import refresh
from offload_client.connections import Connections
from offload_client.identity import save_identity
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import AuthenticationError, GatewayUnreachableError, UsageError
from tests.fixtures.memberidentity import identity

BUILDX = Path(__file__).resolve().parents[4] / ".tools" / "bin" / "buildx"
HOUR = 3600.0
NOBODY = "127.0.0.1:1"


def invocation(tmp_path: Path) -> Invocation:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "buildx").symlink_to(BUILDX)
    environment = {"HOME": str(tmp_path), "PATH": str(programs), "OFFLOAD_KEYRING": "off"}
    return Invocation((), tmp_path, environment, 0, text_stream(1), text_stream(2))


def made(run: Invocation, name: str = "pool") -> builders.Builder:
    builder = builders.Builder(name, NOBODY, "shop", ("linux/amd64",))
    builders.save_builder(run, builder, identity(-HOUR, HOUR / 2))
    return builder


def test_buildx_and_we_write_the_same(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    registration = Registration(run)
    builder = made(run)
    registration.add(builder, use=True)
    assert list(registration.program) == [str(tmp_path / "bin" / "buildx")]
    by_buildx = registration.store.find("pool")
    assert registration.store.current() == "pool"
    assert registration.is_ours("pool")
    without = dataclasses.replace(run, environment={**run.environment, "PATH": ""})
    ours = Registration(without)
    assert list(ours.program) == []
    ours.add(builder, use=True)
    assert ours.store.find("pool") == by_buildx
    assert registration.remove("pool")
    assert not registration.remove("pool")
    assert registration.store.find("pool") is None


def test_a_builder_of_somebody_else_stays(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    registration = Registration(run)
    registration.store.save("pool", endpoint="tcp://other:1", options={})
    with pytest.raises(UsageError, match="not ours"):
        registration.add(made(run), use=False)
    assert not registration.remove("pool")
    assert registration.store.find("pool") is not None


async def test_a_gateway_that_does_not_answer_is_told(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builder = made(run)
    login = identity(-HOUR, HOUR / 2)
    save_identity(run, NOBODY, login)
    builders.write_identity(run, builder, login)
    async with Connections() as connections:
        (result,) = await refresh(run, connections, [builder])
    assert isinstance(result.problem, GatewayUnreachableError)
    assert not result.changed
    assert result.expires_at == pytest.approx(login.expires_at, abs=2)


async def test_without_a_login_nothing_is_renewed(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builder = made(run)
    async with Connections() as connections:
        (result,) = await refresh(run, connections, [builder])
    assert isinstance(result.problem, AuthenticationError)


async def test_a_young_certificate_stays_as_it_is(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builder = made(run)
    save_identity(run, NOBODY, identity(-HOUR, 200 * HOUR))
    async with Connections() as connections:
        (first,) = await refresh(run, connections, [builder])
        (second,) = await refresh(run, connections, [builder])
    assert (first.changed, first.problem) == (True, None)
    assert (second.changed, second.problem) == (False, None)
