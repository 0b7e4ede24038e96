"""Real builds on real nodes whose base images come through the pool's mirror."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Any

import pytest

from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.cache_service_pb2 import StepReason
from offload_proto.v1.nodes_service_pb2 import WhyTask
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, RawClient, wait_free
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.upstreams import counted, push_base

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from offload_builder.node.agent import NodeAgent


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path / "upstream") as registry:
        yield registry


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


def registry_file(folder: Path, registry: DockerRegistry, *, login: bool = True) -> Path:
    """Write what an administrator writes for a registry."""
    lines = [f'[registry."{registry.address}"]', "http = true"]
    if login:
        (folder / "password").write_text(PASSWORD + "\n")
        lines += [f'username = "{USER}"', f'password_file = "{folder / "password"}"']
    path = folder / "registries.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Person(RawClient):
    """Builds one Dockerfile; has a login, or none."""

    login: tuple[str, str] = ("", "")
    asked = 0

    async def answer(self, message: node_pb.RunResponse) -> None:
        if message.WhichOneof("message") != "credentials_request":
            await super().answer(message)
            return
        self.asked += 1
        reply = node_pb.CredentialsReply(request_id=message.credentials_request.request_id)
        reply.username, reply.secret = self.login
        await self.send(credentials_reply=reply)


async def build(
    pool: NodePool,
    dockerfile: str,
    *,
    login: tuple[str, str] = ("", ""),
    pull: bool = False,
) -> tuple[Person, node_pb.Result]:
    """Build on the one node that is there."""
    assigned = await pool.assigned()
    person = Person(await pool.channel(assigned), assigned)
    person.dockerfile = dockerfile
    person.login = login
    person.spec.pull = pull
    await person.start()
    result = await person.until("result")
    await person.done()
    return person, result


def printed(person: Person) -> bytes:
    return b"".join(log.data for message in person.seen for log in message.progress.logs)


async def shared(agent: NodeAgent, kind: str, count: int) -> list[str]:
    """Wait until the shared store has at least so many objects of a kind."""
    objects = agent._store.objects
    assert objects is not None
    async with asyncio.timeout(20):
        while True:
            found = await objects.list_objects(f"projects/default/{kind}/", limit=1000)
            if len(found) >= count and not await agent._store.uploads.pending_count():
                return [item.key for item in found]
            await asyncio.sleep(0.1)


def s3(minio: MinioServer) -> dict[str, Any]:
    return {
        "s3_endpoint": minio.endpoint_url,
        "s3_access_key": minio.access_key,
        "s3_secret_key": minio.secret_key,
    }


async def test_base_that_was_there_explains_no_step(pool, upstream, tmp_path):
    push_base(upstream, "team/base", "1", "hello")
    agent = await pool.start_node("one", registry_config=registry_file(tmp_path, upstream))
    base = f"FROM {upstream.address}/team/base:1\n"
    ids = []
    for steps in ("RUN echo one\n", "RUN echo one\n", "RUN echo two\n"):
        person, result = await build(pool, base + steps)
        assert result.HasField("success"), result
        last = result.stats
        ids.append(person.assigned.build_id)
    assert (last.steps_total, last.steps_cached) == (1, 0)
    desk = (await agent._projects.runtime("default")).why
    # BuildKit never says of a FROM that it was cached.
    found = await desk.answer(WhyTask(build_id=ids[1], earlier_build_ids=ids[:1]))
    assert [step.name for step in found.steps] == []
    found = await desk.answer(WhyTask(build_id=ids[2], earlier_build_ids=ids[1::-1]))
    assert [(step.kind, *step.details) for step in found.steps] == [
        (StepReason.KIND_TEXT_CHANGED, "RUN echo one -> RUN echo two")
    ]


async def test_second_node_takes_layers_from_the_pool(pool, upstream, tmp_path, capfd):
    image = push_base(upstream, "team/base", "1", "hello from upstream", size_bytes=20 << 20)
    config = registry_file(tmp_path, upstream)
    steps = f"FROM {upstream.address}/team/base:1\nRUN cat /version\n"
    with MinioServer(tmp_path / "minio") as minio:
        agent = await pool.start_node("one", registry_config=config, **s3(minio))
        person, result = await build(pool, steps)
        assert result.HasField("success"), result
        assert b"hello from upstream" in printed(person)
        assert person.asked == 0
        # BuildKit knows the way and no login.
        toml = next((pool.folder / "one").rglob("buildkitd.toml")).read_text()
        assert "/base/" in toml
        assert PASSWORD not in toml
        assert USER not in toml
        # One for the index, one for the platform's manifest.
        keys = await shared(agent, "images", 2)
        assert any(key.endswith(image.digest[7:]) for key in keys)
        assert len(await shared(agent, "bases", 1)) == 1
        await wait_free(agent)
        await pool.stop_node("one")
        agent = await pool.start_node("two", registry_config=config, **s3(minio))
        person, result = await build(pool, steps.replace("cat", "ls -l"))
        assert result.HasField("success"), result
        assert b"/version" in printed(person)
    logged = "".join(capfd.readouterr())
    assert "base_images.blob.pulled" in logged
    assert PASSWORD not in logged
    assert base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode() not in logged
    for layer in image.layers:
        assert counted(upstream, "GET", layer.digest) == (2 if len(layer.blob) > 16 << 20 else 1)
    assert counted(upstream, "GET", f"/manifests/{image.digest}") == 1


async def test_build_goes_on_while_the_registry_is_away(pool, tmp_path):
    registry = DockerRegistry(tmp_path / "upstream")
    with registry:
        push_base(registry, "base", "1", "kept")
        config = registry_file(tmp_path, registry)
        options = {"registry_config": config, "base_images_recheck": 0.0}
        await pool.start_node("one", **options)
        _, result = await build(pool, f"FROM {registry.address}/base:1\nRUN true\n")
        assert result.HasField("success"), result
    person, result = await build(pool, f"FROM {registry.address}/base:1\nRUN cat /version\n")
    assert result.HasField("success"), result
    assert b"kept" in printed(person)
    _, result = await build(pool, f"FROM {registry.address}/base:2\nRUN cat /version\n")
    assert "is not reachable" in result.failure.message


async def test_moved_tag_is_built_with_pull_at_once(pool, upstream, tmp_path):
    push_base(upstream, "base", "1", "old")
    await pool.start_node("one", registry_config=registry_file(tmp_path, upstream))
    steps = f"FROM {upstream.address}/base:1\nRUN cat /version; echo "
    person, _ = await build(pool, steps + "first\n")
    assert b"old" in printed(person)
    push_base(upstream, "base", "1", "new")
    person, _ = await build(pool, steps + "second\n")
    assert b"old" in printed(person)
    person, _ = await build(pool, steps + "third\n", pull=True)
    assert b"new" in printed(person)


async def test_private_image_of_a_person_is_pulled_with_their_login_and_not_kept(
    pool, upstream, tmp_path
):
    image = push_base(upstream, "private/base", "1", "mine")
    config = registry_file(tmp_path, upstream, login=False)
    agent = await pool.start_node("one", registry_config=config)
    steps = f"FROM {upstream.address}/private/base:1\nRUN cat /version\n"
    _, result = await build(pool, steps)
    assert result.failure.kind == node_pb.Failure.KIND_REGISTRY_AUTH
    assert "docker login" in result.failure.message
    person, result = await build(pool, steps, login=(USER, PASSWORD))
    assert result.HasField("success"), result
    assert b"mine" in printed(person)
    disk = (await agent._store.project("default")).store.disk
    kept = [digest for digest in (image.digest, image.config_digest) if disk.has(digest)]
    assert kept == []
    assert agent.statistics.base_pulls == 0


async def test_steps_of_a_build_cannot_use_the_mirror(pool, upstream, tmp_path):
    push_base(upstream, "base", "1")
    agent = await pool.start_node("one", registry_config=registry_file(tmp_path, upstream))
    port = agent._registry_server.address.rpartition(":")[2]
    paths = [
        f"v2/{'0' * 48}/base/{upstream.address}/base/manifests/1",
        f"v2/base/{upstream.address}/base/manifests/1",
        "v2/_catalog",
        "v2/",
    ]
    tries = "\n".join(
        f"RUN wget -q -O - http://127.0.0.1:{port}/{path} && echo REACHED || echo refused"
        for path in paths
    )
    dockerfile = f"FROM {upstream.address}/base:1\nCOPY busybox /bin/wget\n{tries}\n"
    person, result = await build(pool, dockerfile)
    assert result.HasField("success"), result
    assert printed(person).count(b"refused") == len(paths) - 1
    assert printed(person).count(b"REACHED") == 1  # the last one says only that this is a registry


async def test_base_images_can_be_turned_off(pool, upstream, tmp_path):
    push_base(upstream, "base", "1", "direct")
    config = registry_file(tmp_path, upstream)
    agent = await pool.start_node("one", registry_config=config, base_images=False)
    steps = f"FROM {upstream.address}/base:1\nRUN cat /version\n"
    person, _ = await build(pool, steps, login=(USER, PASSWORD))
    assert b"direct" in printed(person)
    assert person.asked > 0
    assert agent.statistics.base_checks == 0


async def test_name_that_does_not_exist_fails_fast(pool, upstream, tmp_path):
    push_base(upstream, "base", "1")
    await pool.start_node("one", registry_config=registry_file(tmp_path, upstream))
    started = time.monotonic()
    _, result = await build(
        pool, f"FROM {upstream.address}/base:none\nRUN true\n", login=(USER, PASSWORD)
    )
    assert "not found" in result.failure.message
    assert time.monotonic() - started < 15
