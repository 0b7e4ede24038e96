"""Stock docker buildx through a real gateway and a real node."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from offload_builder.node.proxy import server
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.buildx import Buildx, finished, until_output
from tests.fixtures.node import NodePool, wait_free


@contextlib.asynccontextmanager
async def serving(slots=2, **options):
    async with NodePool() as pool:
        agent = await pool.start_node(slots=slots, **options)
        async with Buildx(pool.gateway.address, pool.keys) as user:
            yield pool, agent, user


async def history(pool):
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    reply = await stub.List(builds_pb.ListRequest(), metadata=call_metadata(), timeout=20)
    return list(reply.builds)


async def log_of(pool, build_id):
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    call = stub.Logs(builds_pb.LogsRequest(build_id=build_id), metadata=call_metadata(), timeout=20)
    return [batch async for answer in call for batch in answer.batches]


async def wait_ended(pool, count=1):
    async with asyncio.timeout(20):
        while True:
            builds = await history(pool)
            ended = [build for build in builds if build.HasField("completed_at")]
            if len(ended) >= count:
                return builds
            await asyncio.sleep(0.05)


async def test_a_build_works_and_is_in_history_with_its_log():
    async with serving() as (pool, agent, user):
        result = await user.build("-t", "shop/app:1", "-o", "type=oci,dest=image.tar")
        assert result.code == 0, result.output
        image = (user.context / "image.tar").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(image)) as tar:
            index = json.load(tar.extractfile("index.json"))
            digest = index["manifests"][0]["digest"].removeprefix("sha256:")
            blob = tar.extractfile(f"blobs/sha256/{digest}").read()
            assert hashlib.sha256(blob).hexdigest() == digest
        (build,) = await wait_ended(pool)
        assert build.state == builds_pb.BUILD_STATE_SUCCEEDED
        assert (build.client, build.member, build.node_id) == ("buildx", "admin", "one")
        assert build.dockerfile_path == "Dockerfile"
        assert build.stats.steps_total == 3
        names = {v.name for batch in await log_of(pool, build.build_id) for v in batch.vertices}
        assert any("RUN echo hello" in name for name in names)
        assert agent.registry.capabilities() == []
        await wait_free(agent)


async def test_what_is_not_a_build_needs_no_slot():
    async with serving() as (pool, _agent, user):
        assert "running" in await user.ok("ls")
        assert "linux/amd64" in await user.ok("inspect", "--bootstrap")
        assert (await user.build()).code == 0
        assert "Total:" in await user.ok("du", "--verbose")
        listed = await user.ok("history", "ls", "--format", "{{.Ref}}")
        ref = listed.strip().rpartition("/")[2]
        logs = await user.ok("history", "logs", ref)
        assert "RUN echo hello" in logs
        assert "Dockerfile" in await user.ok("history", "inspect", ref)
        await user.ok("history", "rm", ref)
        assert len(await wait_ended(pool)) == 1
        workers = await user.buildctl("debug", "workers")
        assert workers.code == 0, workers.output


async def test_buildctl_builds():
    async with serving() as (pool, _agent, user):
        result = await user.buildctl(
            "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context=.",
            "--local=dockerfile=.",
        )  # fmt: skip
        assert result.code == 0, result.output
        await wait_ended(pool)


async def test_secrets_reach_the_step_and_no_log():
    async with serving() as (pool, _agent, user):
        (user.context / "token").write_text("s3cr3t-value")
        user.dockerfile("RUN --mount=type=secret,id=token busybox sha256sum /run/secrets/token\n")
        result = await user.build("--secret", "id=token,src=token")
        assert result.code == 0, result.output
        assert hashlib.sha256(b"s3cr3t-value").hexdigest() in result.output
        (build,) = await wait_ended(pool)
        assert b"s3cr3t-value" not in b"".join(
            batch.SerializeToString() for batch in await log_of(pool, build.build_id)
        )


async def test_a_failing_step_is_shown_and_recorded():
    async with serving() as (pool, agent, user):
        user.dockerfile("RUN echo before && exit 7\n")
        result = await user.build()
        assert result.code != 0
        assert "exit code: 7" in result.output
        (build,) = await wait_ended(pool)
        assert build.state == builds_pb.BUILD_STATE_FAILED
        assert "exit code: 7" in build.error
        await wait_free(agent)


async def test_bake_with_linked_targets_runs_in_one_slot():
    async with serving(slots=1) as (pool, agent, user):
        user.dockerfile("RUN echo base > /base\n")
        (user.context / "Dockerfile.app").write_text(
            "FROM base\nRUN cat /base && echo app > /app\n"
        )
        (user.context / "docker-bake.hcl").write_text(
            'group "default" { targets = ["app", "other"] }\n'
            'target "base" {}\n'
            'target "app" {\n dockerfile = "Dockerfile.app"\n'
            ' contexts = { base = "target:base" }\n}\n'
            'target "other" { args = { X = "1" } }\n'
        )
        output = await user.ok("bake", "--progress", "plain")
        assert "echo app" in output
        builds = await wait_ended(pool, 3)
        assert {build.state for build in builds} == {builds_pb.BUILD_STATE_SUCCEEDED}
        await wait_free(agent)


async def test_a_second_build_waits_visibly_for_the_only_slot():
    # Longer than the ten seconds for which a session of Go's HTTP/2 waits for its other end.
    async with serving(slots=1) as (pool, _agent, user):
        user.dockerfile("RUN sleep 14\n")
        first = await user.start("build", "--progress", "plain", ".")
        await until_output(first, "RUN sleep 14")
        user.dockerfile("RUN echo second > /second\n", "Dockerfile.second")
        began = time.monotonic()
        second = await user.start("build", "--progress", "plain", "-f", "Dockerfile.second", ".")
        seen = await until_output(second, "queue position 1")
        assert time.monotonic() - began < 3
        seen += await until_output(second, "node one is busy") if "busy" not in seen else ""
        result = await finished(second)
        assert result.code == 0, seen + result.output
        assert (await finished(first)).code == 0
        await wait_ended(pool, 2)


async def test_leaving_the_queue_takes_no_slot_and_ends_at_once():
    async with serving(slots=1) as (_pool, agent, user):
        user.dockerfile("RUN sleep 5\n")
        first = await user.start("build", "--progress", "plain", ".")
        await until_output(first, "RUN sleep 5")
        second = await user.start("build", "--progress", "plain", "--no-cache", ".")
        await until_output(second, "queue position 1")
        second.send_signal(2)
        result = await finished(second, 5)
        assert result.code != 0
        assert result.seconds < 1.5
        assert (await finished(first)).code == 0
        await wait_free(agent)
        assert agent.heartbeat().running == 0


@pytest.mark.parametrize("signal", [2, 9])
async def test_a_client_that_goes_ends_its_build(signal):
    async with serving() as (pool, agent, user):
        user.dockerfile("RUN sleep 100\n")
        build = await user.start("build", "--progress", "plain", ".")
        await until_output(build, "RUN sleep 100")
        await asyncio.sleep(0.5)
        build.send_signal(signal)
        await finished(build, 10)
        (record,) = await wait_ended(pool)
        assert record.state == builds_pb.BUILD_STATE_CANCELED
        assert record.error == "the client went away"
        await wait_free(agent)


async def test_a_build_cancelled_at_the_gateway_ends_with_that_sentence():
    async with serving() as (pool, agent, user):
        user.dockerfile("RUN sleep 100\n")
        build = await user.start("build", "--progress", "plain", ".")
        await until_output(build, "RUN sleep 100")
        (record,) = await history(pool)
        stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
        await stub.Cancel(
            builds_pb.CancelRequest(build_id=record.build_id), metadata=call_metadata(), timeout=20
        )
        result = await finished(build, 10)
        assert "cancelled by admin" in result.output
        await wait_free(agent)


async def test_a_project_of_others_is_refused_with_a_sentence():
    async with serving() as (pool, _agent, _user):
        await pool.gateway.create_project("shop")
        token = await pool.gateway.create_token("eve", identity_pb.ROLE_MEMBER, "shop")
        keys = await pool.gateway.login(token)
        async with Buildx(pool.gateway.address, keys) as eve:
            result = await eve.build()
            assert result.code != 0
            assert "default" in result.output
            assert "deadline" not in result.output
            assert result.seconds < 2
        assert await history(pool) == []


async def test_a_client_without_certificate_is_told_to_log_in():
    async with serving() as (pool, _agent, user):
        options = ",".join(user.options(certificate=False))
        await user.ok("create", "--name", "bare", "--driver", "remote", "--use", "--driver-opt",
                      options, f"tcp://{pool.gateway.address}")  # fmt: skip
        result = await user.build()
        assert "offload login" in result.output
        assert result.seconds < 2


async def test_a_revoked_token_builds_no_more():
    async with serving() as (pool, _agent, _user):
        token = await pool.gateway.create_token("ann", identity_pb.ROLE_MEMBER, "default")
        keys = await pool.gateway.login(token)
        async with Buildx(pool.gateway.address, keys) as ann:
            assert (await ann.build()).code == 0
            admin = await pool.gateway.admin()
            await admin.RevokeToken(
                identity_pb.RevokeTokenRequest(token_id=token.split("_")[1]),
                metadata=call_metadata(), timeout=20,
            )  # fmt: skip
            result = await ann.build()
            assert result.code != 0
            assert "revoked" in result.output


async def test_a_killed_buildkitd_is_named():
    async with serving() as (pool, agent, user):
        user.dockerfile("RUN sleep 100\n")
        build = await user.start("build", "--progress", "plain", ".")
        await until_output(build, "RUN sleep 100")
        (runtime,) = agent._projects.running()
        runtime._daemon._process.kill()
        result = await finished(build, 15)
        assert result.code != 0
        assert "BuildKit could not" in result.output
        (record,) = await wait_ended(pool)
        assert record.state == builds_pb.BUILD_STATE_FAILED
        await wait_free(agent)
        assert (await user.build("-f", "-")).code != 0  # an empty Dockerfile, by a new BuildKit


async def test_a_members_prune_spares_what_the_team_uses():
    async with serving() as (pool, _agent, user):
        assert (await user.build()).code == 0
        token = await pool.gateway.create_token("ann", identity_pb.ROLE_MEMBER, "default")
        async with Buildx(pool.gateway.address, await pool.gateway.login(token)) as ann:
            assert "Total:\t0B" in await ann.ok("prune", "--all", "--force")
            assert "RUN" not in await ann.ok("du")
            other = (await ann.ok("history", "ls", "--format", "{{.Ref}}")).strip()
            result = await ann.run("history", "rm", other.rpartition("/")[2])
            assert "only an administrator" in result.output
        result = await user.build()
        assert result.output.count("CACHED") == 3
        assert "Total:\t0B" not in await user.ok("prune", "--all", "--force")


async def test_entitlements_need_the_nodes_permission():
    async with serving() as (_pool, _agent, user):
        user.dockerfile("RUN --network=host true\n")
        result = await user.build("--allow", "network.host")
        assert result.code != 0
        assert "does not permit it" in result.output
        assert result.seconds < 3


async def test_results_come_from_the_projects_cache_on_another_node():
    async with NodePool() as pool:
        await pool.start_node("one")
        async with Buildx(pool.gateway.address, pool.keys) as user:
            assert (await user.build()).code == 0
            await user.ok("prune", "--all", "--force")
            result = await user.build("--cache-from", "type=offload")
            assert result.code == 0, result.output
            assert result.output.count("CACHED") >= 3
            assert "the shared cache" in result.output
            builds = await wait_ended(pool, 2)
            for build in builds:
                for batch in await log_of(pool, build.build_id):
                    assert not any("127.0.0.1" in vertex.name for vertex in batch.vertices)


async def test_without_a_node_the_gateway_says_so_at_once():
    async with NodePool() as pool, Buildx(pool.gateway.address, pool.keys) as user:
        result = await user.build()
        assert result.code != 0
        assert "no node is attached" in result.output
        assert result.seconds < 2


async def test_a_stopped_client_is_noticed(monkeypatch):
    monkeypatch.setattr(server, "KEEPALIVE_SECONDS", 0.5)
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    async with serving() as (pool, agent, user):
        user.dockerfile("RUN sleep 100\n")
        build = await user.start("build", "--progress", "plain", ".")
        await until_output(build, "RUN sleep 100")
        await asyncio.sleep(3)
        assert agent.heartbeat().running == 1
        build.send_signal(19)
        (record,) = await wait_ended(pool)
        assert record.state == builds_pb.BUILD_STATE_CANCELED
        await wait_free(agent)


async def test_a_node_that_drains_lets_builds_end_and_refuses_those_that_wait():
    async with serving(slots=1) as (pool, _agent, user):
        user.dockerfile("RUN sleep 4\n")
        first = await user.start("build", "--progress", "plain", ".")
        await until_output(first, "RUN sleep 4")
        second = await user.start("build", "--progress", "plain", "--no-cache", ".")
        await until_output(second, "queue position 1")
        pool.ask_to_stop()
        result = await finished(second, 5)
        assert "shutting down" in result.output
        assert (await finished(first)).code == 0


async def test_a_place_in_the_queue_survives_a_restart_of_the_gateway():
    async with serving(slots=1) as (pool, agent, user):
        user.dockerfile("RUN sleep 8\n")
        first = await user.start("build", "--progress", "plain", ".")
        await until_output(first, "RUN sleep 8")
        # Only the node's link breaks: the client's own connection goes through the gateway.
        second = await user.start("build", "--progress", "plain", "--no-cache", ".")
        await until_output(second, "queue position 1")
        pool.link.cut()
        await until_output(second, "keeps its place")
        pool.link.up = True
        result = await finished(second)
        assert result.code == 0, result.output
        assert (await finished(first)).code == 0
        assert len(await wait_ended(pool, 2)) == 2
        await wait_free(agent)


async def test_untrusted_members_have_a_buildkit_of_their_own():
    async with serving() as (pool, agent, user):
        assert (await user.build()).code == 0
        token = await pool.gateway.create_token("fork", identity_pb.ROLE_UNTRUSTED, "default")
        async with Buildx(pool.gateway.address, await pool.gateway.login(token)) as fork:
            assert "Total:\t\t0B" in await fork.ok("du")
            result = await fork.build("--build-arg", "OFFLOAD_BRANCH=main")
            assert result.code == 0, result.output
            await fork.ok("prune", "--all", "--force")
        assert (await user.build()).output.count("CACHED") == 3
        domains = {runtime.domain.name for runtime in agent._projects.running()}
        assert domains == {"", "untrusted-fork"}


async def test_flags_that_need_more_than_a_solve():
    async with serving() as (_pool, agent, user):
        del user.environment["BUILDX_NO_DEFAULT_ATTESTATIONS"]
        await user.ok(
            "build", "--metadata-file", "meta.json", "--provenance", "mode=max", "-o",
            "type=oci,dest=image.tar", "--cache-to", "type=local,dest=cache,mode=max", ".",
        )  # fmt: skip
        metadata = json.loads((user.context / "meta.json").read_text())
        assert "buildx.build.provenance" in metadata
        assert metadata["containerimage.digest"].startswith("sha256:")
        assert "127.0.0.1" not in json.dumps(metadata)
        assert (user.context / "cache" / "index.json").exists()
        await user.ok("prune", "--all", "--force")
        again = await user.build(
            "--cache-from", "type=local,src=cache", "--cache-from", "type=none"
        )
        assert again.code == 0, again.output
        assert again.output.count("CACHED") >= 3
        assert "Check complete" in await user.ok("build", "--call", "check", ".")
        missing = await user.build("--target", "nowhere")
        assert 'target stage "nowhere" could not be found' in missing.output
        wrong = await user.build("--cache-from", "type=s3,bucket=b,region=r,name=n")
        assert "needs access_key_id" in wrong.output
        (user.context / "Dockerfile.big").write_text("FROM scratch\nCOPY busybox /\n")
        await user.ok("build", "-f", "Dockerfile.big", "-o", "type=local,dest=out", ".")
        copied = (user.context / "out" / "busybox").read_bytes()
        assert copied == (user.context / "busybox").read_bytes()
        await wait_free(agent)


async def test_a_bake_file_from_the_network_is_read_by_a_build_that_leaves_no_record(tmp_path):
    (tmp_path / "docker-bake.hcl").write_text(
        'target "default" {\n dockerfile-inline = "FROM scratch\\nCOPY docker-bake.hcl /\\n"\n}\n'
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            async with serving(slots=1) as (pool, agent, user):
                url = f"http://127.0.0.1:{web.server_address[1]}/docker-bake.hcl"
                await user.ok("bake", "--progress", "plain", "--print", url)
                (build,) = await wait_ended(pool)
                assert build.state == builds_pb.BUILD_STATE_SUCCEEDED
                await wait_free(agent)
        finally:
            web.shutdown()
            thread.join()
