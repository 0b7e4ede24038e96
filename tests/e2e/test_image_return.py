"""The image comes back: into engines of both kinds, and to a registry with a login."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.engine import DockerEngine
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member, Pool

STEPS = 'RUN head -c 3000000 /dev/urandom > /big\nCOPY note /note\nCMD ["cat", "/note"]\n'


@pytest.fixture(scope="module", params=["graphdriver", "containerd"])
def engine(request: pytest.FixtureRequest) -> Iterator[DockerEngine]:
    with DockerEngine(request.param) as running:
        yield running


def docker(engine: DockerEngine, *arguments: str) -> str:
    done = subprocess.run(
        ["docker", "-H", engine.host, *arguments],
        capture_output=True, text=True, timeout=60, env=engine.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def note_in(engine: DockerEngine, name: str) -> str:
    """Return what the image's command prints, or the file that it prints."""
    if engine.kind == "graphdriver":
        return docker(engine, "run", "--rm", "--network", "none", name)
    # Engine 29 starts no container with Debian's older runc, but it unpacks the image.
    container = docker(engine, "create", name).strip()
    done = subprocess.run(
        ["docker", "-H", engine.host, "cp", f"{container}:/note", "-"],
        capture_output=True, timeout=60, check=True, env=engine.environment,
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        content = archive.extractfile("note")
        assert content is not None
        return content.read().decode()


def test_load_brings_only_missing_layers_and_the_image_runs(
    pool: Pool, engine: DockerEngine, tmp_path: Path
) -> None:
    member = pool.member(DOCKER_HOST=engine.host)
    context = make_context(tmp_path / "c", STEPS, note="first\n")
    name = f"e2e-{engine.kind}"
    first = member.build("-t", name, "--load", context)
    assert first.returncode == 0, first.stderr
    assert note_in(engine, name) == "first\n"

    again = member.build("-t", name, "--load", context)
    assert again.returncode == 0, again.stderr
    assert re.search(r"0 layers received \(0B\)", again.stderr), again.stderr

    (context / "note").write_text("second\n")
    changed = member.build("-t", name, "--load", context)
    assert changed.returncode == 0, changed.stderr
    found = re.search(r"(\d+) layers received \((\S+)\), (\d+) were there", changed.stderr)
    assert found is not None, changed.stderr
    assert int(found[1]) == 1
    assert member.wait_state("succeeded")["stats"]["returned_bytes"] < 20_000
    assert note_in(engine, name) == "second\n"


def test_image_id_after_load_is_the_one_of_the_engine(
    pool: Pool, engine: DockerEngine, tmp_path: Path
) -> None:
    member = pool.member(DOCKER_HOST=engine.host)
    context = make_context(tmp_path / "c", STEPS, note="by id\n")
    result = member.run("offload-build", "-q", "--load", "--iidfile", tmp_path / "iid", context)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    image_id = (tmp_path / "iid").read_text()
    assert result.stdout == f"{image_id}\n"
    assert note_in(engine, image_id) == "by id\n"
    loud = member.build("--load", context)
    assert loud.returncode == 0, loud.stderr
    assert loud.stdout == ""
    assert "image.loaded" not in loud.stderr
    assert "image.loaded" in member.build("--load", context, OFFLOAD_DEBUG="1").stderr


def test_load_without_an_engine_says_what_to_do(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo x > /x\n")
    result = member.build(
        "-t", "x", "--load", context, DOCKER_HOST=f"unix://{tmp_path}/no-such-socket"
    )
    assert result.returncode == 12, result.stderr
    assert "Traceback" not in result.stderr
    assert "no-such-socket" in result.stderr


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def test_push_uses_the_docker_login_of_the_user(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    registry.write_login(member.home)
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:1", "--push", context)
    assert result.returncode == 0, result.stderr
    index = registry.get("/v2/team/app/manifests/1")
    image, attestation = index["manifests"]
    assert attestation["annotations"]["vnd.docker.reference.digest"] == image["digest"]
    manifest = registry.get(f"/v2/team/app/manifests/{image['digest']}")
    assert len(manifest["layers"]) == 3


def test_push_with_a_wrong_login_is_its_own_exit_code(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    registry.write_login(member.home, password="wrong")
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:2", "--push", context)
    assert result.returncode == 8, result.stderr
    assert "Traceback" not in result.stderr
    assert "wrong" not in result.stderr


def test_damaged_docker_configuration_is_a_warning(
    pool: Pool, registry: DockerRegistry, tmp_path: Path
) -> None:
    member = pool.member()
    (member.home / ".docker").mkdir()
    (member.home / ".docker" / "config.json").write_text('{"auths": ')
    context = make_context(tmp_path / "c", "RUN echo pushed > /pushed\n")
    result = member.build("-t", f"{registry.address}/team/app:3", "--push", context)
    # The build went on without a login, which this registry wants.
    assert result.returncode == 8, result.stderr
    assert result.stderr.count("config.json is not valid JSON") == 1
    assert re.search(r"(?m)^.*WARNING.*config.json is not valid JSON", result.stderr)


def test_push_without_a_tag_is_refused(member: Member, tmp_path: Path) -> None:
    result = member.build("--push", make_context(tmp_path / "c"))
    assert result.returncode == 1, result.stderr
    assert "tag is needed when pushing" in result.stderr
