"""Cached content that a node promised BuildKit and cannot give: the build is repeated, not lost."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import os
import re
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from minio import Minio

from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from tests.fixtures.contexts import make_context
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import TOOLS, NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from offload_builder.node.agent import NodeAgent

STEPS = "RUN dd if=/dev/urandom of=/big bs=1M count=3 && sha256sum /big > /sum\n"
MORE = "RUN sha256sum -c /sum && echo all-is-well\n"
BUCKET = "cache"


class Bucket:
    """The shared store of the nodes, and what a test does to its objects."""

    def __init__(self, minio: MinioServer) -> None:
        self.options = {
            "s3_endpoint": minio.endpoint_url,
            "s3_bucket": BUCKET,
            "s3_access_key": minio.access_key,
            "s3_secret_key": minio.secret_key,
        }
        self._client = Minio(
            f"127.0.0.1:{minio.port}", minio.access_key, minio.secret_key, secure=False
        )

    def layers(self) -> dict[str, bytes]:
        """Return the layers by key."""
        found = {}
        for item in self._client.list_objects(BUCKET, recursive=True):
            if not item.object_name.startswith("projects/default/blobs/"):
                continue
            body = self._client.get_object(BUCKET, item.object_name)
            data = body.read()
            body.close()
            body.release_conn()
            if not data.startswith(b"{"):
                found[item.object_name] = data
        return found

    def large_layer(self) -> tuple[str, bytes]:
        """Return the layer of the step that writes random bytes."""
        return max(self.layers().items(), key=lambda item: len(item[1]))

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(BUCKET, key, io.BytesIO(data), len(data))

    def delete(self, key: str) -> None:
        self._client.remove_object(BUCKET, key)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with MinioServer(tmp_path) as minio:
        yield Bucket(minio)


@pytest.fixture
async def pool(bucket: Bucket) -> AsyncIterator[NodePool]:
    del bucket  # it lives longer than the nodes
    async with NodePool() as running:
        yield running


async def built(pool: NodePool, dockerfile_steps: str) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, dockerfile_steps)
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    return client


async def publish_from_first_node(pool: NodePool, bucket: Bucket) -> None:
    await pool.start_node("one", **bucket.options)
    client = await built(pool, STEPS)
    async with asyncio.timeout(30):
        while (
            await pool.build(client.assigned.build_id)
        ).cache_state != builds_pb.CACHE_STATE_PUBLISHED:
            await asyncio.sleep(0.05)
    await pool.stop_node("one")


def notices_of(client: RawClient) -> list[str]:
    return [message.notice.text for message in client.seen if message.HasField("notice")]


def output_of(client: RawClient) -> bytes:
    return b"".join(log.data for message in client.seen for log in message.progress.logs)


@pytest.mark.parametrize("harm", ["vanished", "cut", "corrupt"])
async def test_a_layer_that_is_not_what_was_promised_is_built_again(
    pool: NodePool, bucket: Bucket, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await publish_from_first_node(pool, bucket)
    key, data = bucket.large_layer()
    if harm == "vanished":
        bucket.delete(key)
    elif harm == "cut":
        bucket.put(key, data[: len(data) // 2])
    else:
        bucket.put(key, data[:1000] + os.urandom(1000) + data[2000:])
    agent = await pool.start_node("two", **bucket.options)
    capsys.readouterr()
    client = await built(pool, STEPS + MORE)
    assert b"all-is-well" in output_of(client)
    assert notices_of(client) == ["cached content could not be read; its steps are built again"]
    stats = client.seen[-1].result.stats
    # The second attempt takes what is whole: the steps before the lost one.
    assert stats.steps_total - stats.steps_cached == 2, stats
    # That the machine is busy is no news of the store.
    warnings = re.findall(r"\[warning +\] (?!gateway\.delayed)(\S+)", capsys.readouterr().out)
    assert len(warnings) <= 2, warnings
    assert "cache.import.failed" in warnings
    await wait_free(agent)


@contextmanager
def corrupting_registry(target: str, digest: str) -> Iterator[str]:
    """Forward to a node's registry, with wrong bytes for one blob; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            upstream = http.client.HTTPConnection(target, timeout=10)
            try:
                upstream.request(self.command, self.path)
                answer = upstream.getresponse()
                body = answer.read()
            finally:
                upstream.close()
            if self.path.endswith(digest):
                body = bytes(len(body))
            self.send_response(answer.status)
            for name in ("Content-Type", "Docker-Content-Digest"):
                if value := answer.getheader(name):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length", "0"))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ingests(agent: NodeAgent) -> int:
    root = agent.config.data / "projects/default/buildkit"
    return sum(1 for _ in root.glob("runc-*/content/ingest/*"))


async def poison(pool: NodePool, agent: NodeAgent, context: Path, digest: str) -> None:
    """Let the node's BuildKit read the cache with wrong bytes for one blob."""
    # While a build runs, its capability shows the cache.
    assigned = await pool.assigned()
    open_build = RawClient(await pool.channel(assigned), assigned, "RUN echo begun; sleep 100\n")
    await open_build.start()
    await open_build.until_text(b"begun")
    (capability,) = agent.registry._states
    (runtime,) = agent._projects.running()
    with corrupting_registry(agent._registry_server.address, digest) as address:
        done = await asyncio.to_thread(
            subprocess.run,
            [TOOLS / "buildctl", "--addr", f"unix://{runtime._daemon.socket_path}", "build",
             "--frontend=dockerfile.v0", "--local", f"context={context}", "--local",
             f"dockerfile={context}", "--import-cache",
             f"type=registry,ref={address}/{capability}/cache:import"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert "unexpected commit digest" in done.stderr
    await asyncio.sleep(1.5)  # its own clean-up is over
    await open_build.send(cancel=node_pb.CancelRun())
    await open_build.until("result")
    await open_build.done()


async def test_a_poisoned_download_is_removed_and_the_cache_is_used_again(
    pool: NodePool, bucket: Bucket, tmp_path: Path
) -> None:
    await publish_from_first_node(pool, bucket)
    key, data = bucket.large_layer()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    assert digest[7:] in key
    agent = await pool.start_node("two", **bucket.options)
    context = make_context(tmp_path / "context", STEPS + MORE)
    for _ in range(3):
        await poison(pool, agent, context, digest)
        await wait_free(agent)
        if ingests(agent):
            break  # BuildKit removes a broken download at times
    assert ingests(agent) == 1, "the wrong bytes wait for their continuation"
    client = await built(pool, STEPS + MORE)
    assert b"all-is-well" in output_of(client)
    assert len(notices_of(client)) == 1
    stats = client.seen[-1].result.stats
    assert stats.steps_cached >= 2, stats  # at most the damaged step and the new one run
    assert ingests(agent) == 0
    again = await built(pool, STEPS + MORE + "RUN echo further\n")
    assert notices_of(again) == []
    await wait_free(agent)
