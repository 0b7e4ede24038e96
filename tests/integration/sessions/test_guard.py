"""The docker CLI at a real engine behind the guard of a session."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import replace

import pytest

from offload_builder.node.sessions.guard.door import Doors
from offload_builder.node.sessions.nodeimages import NodeImages
from tests.fixtures.cdi import write_specification
from tests.fixtures.engine import DockerEngine
from tests.fixtures.guardedengine import PLACE, PlainEngine, at_door, busybox_archive, write_runtime
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.registrybuilds import write_registries
from tests.fixtures.tokenserver import TokenServer

RUN = ("run", "--rm", "--network", "none")


class NoImages:
    """A node without builds and registries."""

    def built(self, place, name):
        return ""

    @contextlib.asynccontextmanager
    async def source(self, place, registry, name):
        yield None

    async def login(self, place, name, *, push):
        return ""


class NoModels:
    def __init__(self) -> None:
        self.wanted = 0

    async def prepare(self, engine, place) -> None:
        self.wanted += 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    specs = tmp_path_factory.mktemp("cdi")
    write_specification(specs, "0", "1")
    runtime = write_runtime(tmp_path_factory.mktemp("runc"))
    arguments = ["--cdi-spec-dir", specs, "--add-runtime", f"own={runtime}"]
    with DockerEngine("containerd", arguments=[*arguments, "--default-runtime=own"]) as running:
        running.docker("import", "-", "busybox", stdin=busybox_archive())
        yield running


@pytest.fixture
async def session(engine):
    """The CLI at a door of an engine with two GPUs, without anything of a node."""
    models = NoModels()
    plain = PlainEngine(engine, devices=("nvidia.com/gpu=0", "nvidia.com/gpu=1"))
    async with at_door(Doors(NoImages(), models, lambda _: "")(plain, PLACE)) as cli:
        cli.models = models
        yield cli


async def test_commands_do_what_they_do_at_the_engine_itself(session):
    code, text = await session(*RUN, "-i", "busybox", "cat", stdin=b"through")
    assert (code, text) == (0, "through")
    code, text = await session(*RUN, "busybox", "sh", "-c", "echo out; exit 3")
    assert (code, text) == (3, "out\n")
    code, text = await session("version", "--format", "{{.Server.Os}}")
    assert (code, text) == (0, "linux\n")
    started = ("run", "-dt", "--name", "long", "--network", "none", "busybox", "sh")
    assert (await session(*started))[0] == 0
    code, text = await session("exec", "-i", "long", "md5sum", stdin=b"x" * 3_000_000)
    assert (code, text.split()[0]) == (0, hashlib.md5(b"x" * 3_000_000).hexdigest())
    assert (await session("rm", "-f", "long"))[0] == 0


async def test_archives_pass_both_ways(session, tmp_path):
    code, text = await session("save", "-o", str(tmp_path / "image.tar"), "busybox")
    assert (code, text) == (0, "")
    code, text = await session("load", "-i", str(tmp_path / "image.tar"))
    assert code == 0, text
    assert "busybox" in text


async def test_images_are_built_in_the_session(session, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM busybox\nCOPY file /file\n")
    (tmp_path / "file").write_text("from the context")
    code, text = await session("build", "-t", "made-here", str(tmp_path))
    assert code == 0, text
    code, text = await session(*RUN, "made-here", "cat", "/file")
    assert (code, text) == (0, "from the context")


async def test_directories_of_other_machines_are_refused_with_a_sentence(session):
    code, text = await session(*RUN, "-v", "/etc:/x", "busybox", "true")
    assert code == 125
    assert "a session's engine has no directory /etc of your machine" in text
    assert "docker cp" in text
    assert (await session(*RUN, "-v", "named:/x", "busybox", "true"))[0] == 0


async def test_gpus_are_those_of_the_session(session):
    for wish in ("--gpus=all", "--gpus=2", "--gpus=device=1", "--device=nvidia.com/gpu=0"):
        code, text = await session(*RUN, wish, "busybox", "cat", "/opt/driver.txt")
        assert (code, text) == (0, "driver-1\n"), wish
    code, text = await session(*RUN, "--gpus=3", "busybox", "true")
    assert code == 125
    assert "this session has not got 3 GPUs: it has nvidia.com/gpu=0, nvidia.com/gpu=1" in text


async def test_the_volume_with_models_is_made_ready_before_it_is_mounted(session):
    assert (await session(*RUN, "-v", "offload-models:/m", "busybox", "true"))[0] == 0
    assert session.models.wanted == 1


async def test_what_a_member_has_built_runs_at_once_and_newer_when_built_again(engine):
    async with NodePool() as pool:
        agent = await pool.start_node(ended_keep=600.0)
        images = node_images(agent)
        client = await built(pool, "one")
        place = replace(PLACE, owner=agent.ended.find(client.assigned.build_id).member)
        address = agent._registry_server.address
        doors = Doors(images, NoModels(), lambda _: address)
        async with at_door(doors(PlainEngine(engine), place)) as cli:
            known = await names(cli)
            code, text = await cli(*RUN, "team/app:v1", "cat", "/made")
            assert code == 0, text
            assert text.splitlines()[-1] == "one"
            assert "Downloaded newer image for team/app:v1" in text
            assert not [word for word in text.split() if "/image" in word]
            await built(pool, "two")
            code, text = await cli(*RUN, "team/app:v1", "cat", "/made")
            assert (code, text) == (0, "two\n")
            # What it was given in the session is the member's own.
            assert (await cli("tag", "busybox", "team/app:v1"))[0] == 0
            await built(pool, "three")
            code, text = await cli(*RUN, "team/app:v1", "echo", "mine")
            assert (code, text) == (0, "mine\n")
            # What had a name before is without one now, as anywhere.
            assert await names(cli) - known == {"team/app:v1"}
        assert not agent.registry.capabilities()
        assert images.built(place, "docker.io/team/app:v1")
        assert not images.built(replace(place, owner="somebody"), "docker.io/team/app:v1")


async def names(cli) -> set[str]:
    text = (await cli("images", "--format", "{{.Repository}}:{{.Tag}}"))[1]
    return set(text.split()) - {"<none>:<none>"}


def node_images(agent) -> NodeImages:
    return NodeImages(
        agent._store,
        agent.registry,
        agent.slots,
        agent.ended,
        agent._registries,
        agent._mirrors,
        agent.isolation,
    )


async def built(pool: NodePool, text: str) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, f"RUN echo {text} > /made\n")
    client.spec.tags.append("team/app:v1")
    client.spec.save_image = True
    await client.start()
    result = await client.until("result")
    assert result.success.image.digest, result
    await client.done()
    async with asyncio.timeout(20):
        while pool._running["one"][0].agent.ended.find(assigned.build_id) is None:
            await asyncio.sleep(0.02)
    return client


async def test_private_registries_are_reached_with_logins_that_the_engine_never_sees(
    engine, tmp_path
):
    with (
        TokenServer(tmp_path / "tokens") as tokens,
        DockerRegistry(tmp_path / "registry", auth=tokens.auth) as registry,
    ):
        (tmp_path / "password").write_text(PASSWORD)
        login = [f'username = "{USER}"', f'password_file = "{tmp_path / "password"}"']
        lines = ("http = true", *login, 'push = ["team/app"]')
        file = write_registries(tmp_path, registry.address, *lines)
        name = f"{registry.address}/team/app:1"
        async with NodePool() as pool:
            agent = await pool.start_node(registry_config=file)
            address = agent._registry_server.address
            doors = Doors(node_images(agent), NoModels(), lambda _: address)
            async with at_door(doors(PlainEngine(engine), PLACE)) as cli:
                assert (await cli("tag", "busybox", name))[0] == 0
                code, text = await cli("push", name)
                assert code == 0, text
                scopes = [scope for asked in tokens.asked for scope in asked.scopes]
                assert set(scopes) == {"repository:team/app:pull,push"}
                # Where the pool's login may not push, nobody's does.
                other = f"{registry.address}/team/other:1"
                assert (await cli("tag", "busybox", other))[0] == 0
                assert (await cli("push", other))[0] == 1
                assert (await cli("rmi", name, other))[0] == 0
                code, text = await cli("pull", name)
                assert code == 0, text
                assert "team/app:1" in text
                code, text = await cli(*RUN, name, "echo", "from-private")
                assert (code, text) == (0, "from-private\n")
                # Without trust there is no login of the pool.
                assert (await cli("rmi", name))[0] == 0
            stranger = replace(PLACE, trust_domain="untrusted-eve", role="untrusted")
            async with at_door(doors(PlainEngine(engine), stranger)) as cli:
                assert (await cli("pull", name))[0] == 1
