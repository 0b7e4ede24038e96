"""The commands for sessions, with a real gateway and real helpers; nodes speak Attach only."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import tarfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from offload_proto.v1 import identity_service_pb2 as identity_pb
from tests.fixtures.gateway import RunningGateway
from tests.integration.sessions.sessioncommands import CONFIG, Person
from tests.integration.sessions.sessionpeer import SessionPeer, member_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_SECONDS = 60.0
OURS = "docker-offload"


class World:
    """A gateway, a node that takes sessions, and ann."""

    def __init__(self, gateway: RunningGateway, node: SessionPeer, stack: AsyncExitStack) -> None:
        self.gateway = gateway
        self.node = node
        self._stack = stack
        self.ann: Person

    async def person(self, name: str) -> Person:
        """Return a new member at a machine of their own."""
        token = await self.gateway.create_token(name, identity_pb.ROLE_MEMBER)
        return await self._stack.enter_async_context(Person(self.gateway, token))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(
            RunningGateway(restart_grace=0.4, client_grace=0.3)
        )
        keys = await gateway.enroll_node("n1")
        peer = SessionPeer(gateway, "n1", keys, endpoints=["127.0.0.1:1"], session_slots=3)
        found = World(gateway, await stack.enter_async_context(peer), stack)
        found.ann = await found.person("ann")
        yield found


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.05)


async def test_session_comes_with_its_context_and_goes_without_a_trace(world: World) -> None:
    ann = world.ann
    out = await ann.well("start")
    assert 'Session "default" is ready on node n1' in out
    assert 'docker uses it now, by the context "docker-offload" (it was "default")' in out
    assert ann.context == OURS
    assert (await ann.well("context", "show", program="docker")).strip() == OURS
    (session_id,) = world.node.did("start")
    socket = ann.sessions / "default/engine.sock"
    listed = json.loads((await ann.well("ps", "--format", "json")).strip())
    assert (listed["session_id"], listed["state"], listed["context"]) == (
        session_id,
        "running",
        OURS,
    )
    (told,) = json.loads(await ann.well("status", "-s", "-f", "json"))
    assert (told["account"], told["node_id"], told["in_use"]) == ("ann", "n1", True)
    assert socket.is_socket()
    text = await ann.well("status")
    assert "Member    ann (member)" in text
    assert "Session default" in text
    assert "Running" in text
    refused = await ann.run("stop")
    assert refused.code == 125
    assert "--force" in refused.err
    assert ann.context == OURS
    out = await ann.well("stop", "--force")
    assert 'docker uses the context "default" again' in out
    assert world.node.did("stop") == [session_id]
    assert ann.docker_config.read_text() == CONFIG
    assert list((ann.home / ".docker").rglob("meta.json")) == []
    assert ann.names == []
    await until(lambda: not ann.helpers())
    assert "No session" in (await ann.run("stop", "-f")).err


async def test_interrupt_while_waiting_leaves_nothing(world: World) -> None:
    ann, admin = world.ann, await member_of(world.gateway)
    world.node.problem = "it is tired"
    world.node.vanish()
    process = await ann.begin("start", "--progress", "plain")
    assert process.stderr is not None
    seen = ""
    async with asyncio.timeout(WAIT_SECONDS):
        while "queue position 1" not in seen:
            seen += (await process.stderr.readline()).decode()
    process.send_signal(signal.SIGINT)
    _, rest = await process.communicate()
    assert process.returncode == 130, rest
    assert await admin.listed() == []
    assert (ann.names, ann.context) == ([], "")
    await until(lambda: not ann.helpers())
    late = await ann.run("start", "--timeout", "1s", "-q")
    assert late.code == 6
    assert "was not ready within 1.0s" in late.err
    assert await admin.listed() == []


async def test_session_that_runs_is_used_again_also_with_its_helper_gone(world: World) -> None:
    ann = world.ann
    first = (await ann.well("start", "-q")).strip()
    (helper,) = ann.helpers()
    os.kill(helper, signal.SIGKILL)
    await until(lambda: not ann.helpers())
    (told,) = json.loads(await ann.well("status", "-s", "-f", "json"))
    assert told["helper"] == "not running"
    again = await ann.run("start", "--memory", "1g", DOCKER_HOST="tcp://h:1")
    assert 'Session "default" runs already' in again.out
    assert "keeps what it was started with" in again.err
    assert "DOCKER_HOST=tcp://h:1 is set" in again.err
    assert len(ann.helpers()) == 1
    await ann.well("context", "use", "default", program="docker")
    await ann.well("use")
    assert ann.context == OURS
    elsewhere = await world.person("ann-laptop")
    # The same member at another machine.
    await elsewhere.well("login", f"https://{world.gateway.address}", "--token", ann.token)
    assert (await elsewhere.well("start", "-q", "--no-use")).strip() == first
    assert elsewhere.context == ""
    assert world.node.did("start") == [first]


async def test_sessions_give_contexts_back_in_any_order(world: World) -> None:
    ann = world.ann
    await ann.well("context", "create", "mine", "--docker", "host=unix:///x", program="docker")
    await ann.well("context", "use", "mine", program="docker")
    await ann.well("start", "one")
    await ann.well("start", "two")
    assert ann.context == f"{OURS}-two"
    unsure = await ann.run("stop", "three", "-f")
    assert unsure.code == 5
    await ann.well("stop", "one", "-f")
    assert ann.context == f"{OURS}-two"
    await ann.well("stop", "two", "-f")
    assert ann.context == "mine"


async def test_stop_asks_and_says_what_is_lost(world: World) -> None:
    ann = world.ann
    await ann.well("start")
    for answer, names in ((b"n\n", ["default"]), (b"y\n", [])):
        primary, secondary = pty.openpty()
        try:
            process = await ann.begin("stop", stdin=secondary)
            os.write(primary, answer)
            _, err = await process.communicate()
        finally:
            os.close(primary)
            os.close(secondary)
        assert process.returncode == 0, err
        assert b"containers, images and volumes will be removed" in err
        assert ann.names == names


async def test_gateway_that_is_away_or_has_forgotten_does_not_keep_the_session_here(
    world: World,
) -> None:
    ann, admin = world.ann, await member_of(world.gateway)
    session_id = (await ann.well("start", "-q")).strip()
    await admin.stop(session_id)
    renewed = await ann.run("start", "-q")
    assert renewed.code == 0, renewed.err
    assert "has ended: stopped by" in renewed.err
    assert renewed.out.strip() != session_id
    await world.gateway.stop()
    forgot = await ann.well("stop", "-f")
    assert 'Forgot the session "default"' in forgot
    assert (ann.names, ann.context) == ([], "")


async def test_session_stays_here_when_it_cannot_be_stopped_unless_that_is_forced(
    world: World,
) -> None:
    ann = world.ann
    await ann.well("start")
    await world.gateway.stop()
    primary, secondary = pty.openpty()
    try:
        process = await ann.begin("stop", stdin=secondary)
        os.write(primary, b"y\n")
        _, err = await process.communicate()
    finally:
        os.close(primary)
        os.close(secondary)
    assert process.returncode == 7
    assert b"--force" in err
    assert (ann.names, ann.context, len(ann.helpers())) == (["default"], OURS, 1)
    (ann.sessions / "default/session.json").write_text("{")
    assert (await ann.run("stop", "default")).code == 3
    assert "could not be read" in await ann.well("stop", "default", "-f")
    assert (ann.names, ann.context) == ([], "")


async def test_shared_session_is_used_and_left_by_another_member(world: World) -> None:
    ann, ben = world.ann, await world.person("ben")
    session_id = (await ann.well("start", "-q")).strip()
    unknown = await ben.run("use", session_id[:6])
    assert unknown.code == 5
    shared = await ann.well("share", "default", "ben")
    assert f"offload use {session_id}" in shared
    out = await ben.well("use", session_id[:6], "--name", "of-ann")
    assert 'This machine uses the session "default" of ann' in out
    assert ben.context == f"{OURS}-of-ann"
    out = await ben.well("stop")
    assert "Left the session" in out
    assert (ben.names, ben.context) == ([], "")
    assert world.node.did("stop") == []
    assert "Only ann may use" in await ann.well("share", "default", "ben", "--remove")
    assert (await ben.run("use", session_id[:6])).code == 5


async def test_bundle_tells_what_is_wrong_and_no_secret(world: World, tmp_path: Path) -> None:
    ann = world.ann
    await ann.well("start")
    log = ann.sessions / "default/helper.log"
    with log.open("a") as file:
        file.write(f"login {ann.token} password=hunter22\n")
    bundle = tmp_path / "b.tar.gz"
    done = await ann.run(
        "diagnose", "-o", str(bundle), REGISTRY_PASSWORD="s3cr3t-registry", MY_VALUE="private-7",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "FAILED: TCP connection to the node at 127.0.0.1:1" in done.err
    assert bundle.stat().st_mode & 0o777 == 0o600
    texts = {}
    with tarfile.open(bundle) as archive:
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            assert file is not None
            texts[entry.name.partition("/")[2]] = file.read().decode()
    assert {
        "checks.txt", "docker-context.json", "helper-status.json", "helper.log", "machine.json",
        "record.json", "session.json", "versions.json",
    } <= set(texts)  # fmt: skip
    everything = "\n".join(texts.values())
    identity = next(ann.home.rglob("identity")).read_text()
    key = identity.split("PRIVATE KEY-----")[1].split("\n")[1]
    for secret in (ann.token, ann.token.split("_")[2], key, "hunter22", "s3cr3t", "private-7"):
        assert secret not in everything
    assert "BEGIN" not in everything


async def test_versions_usage_and_images_are_told_to_people_and_programs(world: World) -> None:
    ann = world.ann
    await ann.well("start")
    found = json.loads(await ann.well("version", "-f", "json"))
    assert found["engines"] == {"default": "29.0.0"}
    assert found["nodes"][0]["node_id"] == "n1"
    assert "docker engine 29.0.0" in await ann.well("version")
    usage = json.loads(await ann.well("usage", "--since", "1h", "-f", "json"))
    assert [one["member"] for one in usage["members"]] == ["ann"]
    assert "ann" in await ann.well("usage")
    assert "nothing with an image" in await ann.well("images")
    assert (await ann.well("ps", "--format", "{{.Name}} {{.Owner}}")).strip() == "default ann"
    wrong = await ann.run("ps", "--format", "{{.Nope}}")
    assert wrong.code == 125
    completed = await ann.well(
        _OFFLOAD_COMPLETE="bash_complete", COMP_WORDS="offload stop d", COMP_CWORD="2"
    )
    assert completed.strip() == "plain,default"


async def test_dockers_own_command_line_has_the_same_commands(world: World) -> None:
    ann = world.ann
    plugins = ann.home / ".docker/cli-plugins"
    plugins.mkdir()
    (plugins / "docker-offload").symlink_to(Path(os.sys.executable).with_name("docker-offload"))
    out = await ann.well("offload", "start", "work", program="docker")
    assert 'Session "work" is ready' in out
    told = json.loads(await ann.well("offload", "status", "work", "-s", "-f", "json",
                                     program="docker"))  # fmt: skip
    assert told[0]["context"] == f"{OURS}-work"
    await ann.well("offload", "stop", "-f", program="docker")
    assert ann.docker_config.read_text() == CONFIG
