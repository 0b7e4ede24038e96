"""Caches that are not the pool's: BuildKit reads and writes them as with docker buildx."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.registry import DockerRegistry
from tests.fixtures.relayedpool import RelayedPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = "COPY in /in\nRUN head -c 100000 /dev/urandom > /random\nRUN cat /random | wc -c > /size\n"


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    with RelayedPool() as running:
        yield running


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def cached_steps(log: str) -> set[str]:
    """Return the names of the steps that came from a cache."""
    names = dict(re.findall(r"^#(\d+) (\[\d/\d\].*)$", log, re.MULTILINE))
    return {names[number] for number in re.findall(r"^#(\d+) CACHED$", log, re.MULTILINE)}


def test_cache_in_a_registry_serves_a_builder_that_knows_nothing(
    relayed: RelayedPool, registry: DockerRegistry, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", STEPS, **{"in": "one"})
    first = relayed.member()
    registry.write_login(first.home)
    reference = f"{registry.address}/team/app:cache"
    result = first.build("--cache-to", f"type=registry,ref={reference},mode=max", context)
    assert result.returncode == 0, result.stderr
    relayed.create_project("registry")
    second = relayed.member()
    registry.write_login(second.home)
    result = second.build(
        "--project", "registry", "--cache-from", reference, "--cache-from", "type=none", context
    )
    assert result.returncode == 0, result.stderr
    assert len(cached_steps(result.stderr)) == 5


def test_cache_in_a_directory_goes_out_and_comes_back(relayed: RelayedPool, tmp_path: Path) -> None:
    member = relayed.member()
    context = make_context(tmp_path / "c", STEPS, **{"in": "two"})
    directory = tmp_path / "cache"
    result = member.build("--cache-to", f"type=local,dest={directory},mode=max", context)
    assert result.returncode == 0, result.stderr
    index = json.loads((directory / "index.json").read_bytes())
    assert len(index["manifests"]) == 1
    blobs = {path.name for path in (directory / "blobs/sha256").iterdir()}
    relayed.create_project("local")
    result = member.build(
        "--project", "local", "--cache-from", f"type=local,src={directory}",
        "-o", f"type=tar,dest={tmp_path}/out.tar", context,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(cached_steps(result.stderr)) == 5
    # A second export adds what is new; with reset, what nobody names any more goes.
    (context / "in").write_text("three")
    result = member.build("--cache-to", f"type=local,dest={directory},mode=max,reset=true", context)
    assert result.returncode == 0, result.stderr
    now = {path.name for path in (directory / "blobs/sha256").iterdir()}
    assert now & blobs
    assert blobs - now
    assert len(json.loads((directory / "index.json").read_bytes())["manifests"]) == 1


def test_missing_directory_is_a_warning(relayed: RelayedPool, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", **{"in": "x"})
    result = relayed.member().build("--cache-from", f"type=local,src={tmp_path}/none", context)
    assert result.returncode == 0, result.stderr
    assert f"local cache import at {tmp_path}/none skipped" in result.stderr


def test_inline_cache_travels_in_the_image(
    relayed: RelayedPool, registry: DockerRegistry, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", STEPS, **{"in": "inline"})
    member = relayed.member()
    registry.write_login(member.home)
    name = f"{registry.address}/team/inline:1"
    result = member.build("-t", name, "--push", "--cache-to", "type=inline", context)
    assert result.returncode == 0, result.stderr
    relayed.create_project("inline")
    result = member.build(
        "--project", "inline", "--cache-from", name, "--cache-from", "type=none", context
    )
    assert result.returncode == 0, result.stderr
    assert len(cached_steps(result.stderr)) == 5


def test_export_that_fails_fails_the_build_unless_told_otherwise(
    relayed: RelayedPool, registry: DockerRegistry, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", **{"in": "refused"})
    member = relayed.member()
    target = f"type=registry,ref={registry.address}/team/refused:cache"
    assert member.build("--cache-to", target, context).returncode == 8
    result = member.build("--cache-to", f"{target},ignore-error=true", context)
    assert result.returncode == 0, result.stderr


def test_keys_of_a_cache_are_never_shown(relayed: RelayedPool, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", **{"in": "keys"})
    result = relayed.member().build(
        "--cache-from",
        "type=s3,bucket=b,region=r,endpoint_url=http://127.0.0.1:1,access_key_id=who,"
        "secret_access_key=topsecret",
        context,
    )
    # A cache that does not answer is no reason to fail.
    assert result.returncode == 0, result.stderr
    assert "topsecret" not in result.stderr
    for log in relayed.folder.glob("*.log"):
        assert "topsecret" not in log.read_text("utf-8", "replace")
