"""Ways to plant a layer, a manifest or a cache mount for a protected branch; each must fail.

Where an attack works inside one trust domain, the test shows that first: else it would prove
nothing when it fails across the border.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offload_builder.gateway.tickets import sign
from offload_cache.registry.grants import CAPABILITY_CHARACTERS
from offload_proto.v1 import builds_service_pb2 as builds_pb
from tests.fixtures.contexts import make_context
from tests.fixtures.node import RawClient
from tests.fixtures.trustpool import TrustPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

CAP_NET_RAW = 13
LAST = "FROM scratch\nCOPY --from=0 /out /\n"
PROXIED = 'RUN mkdir /out && echo "%s through [$http_proxy]" > /out/result\n' + LAST
EVIL_PROXY = ("--build-arg", "http_proxy=http://evil:1")
HOLD = "RUN sleep 60\n"

NOBODYS = "0" * CAPABILITY_CHARACTERS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[TrustPool]:
    async with TrustPool() as running:
        yield running


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def assert_main_is_clean(pool: TrustPool, context: Path, expected: str) -> None:
    """Build main where nothing but the shared store can be poisoned, then on the same node."""
    async with pool.fresh_node():
        built = await pool.build("ci", context, branch="main")
    assert (built.code, built.files.get("result")) == (0, expected), built.log
    built = await pool.build("ci", context, branch="main")
    assert (built.code, built.files.get("result")) == (0, expected), built.log


async def test_input_that_is_no_part_of_the_key_poisons_members_but_not_main(
    pool: TrustPool, tmp_path: Path
) -> None:
    """BuildKit leaves proxies out of a step's key: records then name a foreign layer."""
    context = make_context(tmp_path / "c", PROXIED % "a")
    for who in ("eve", "ann"):
        built = await pool.build(who, context, *EVIL_PROXY, branch="topic")
        assert built.files["result"] == "a through [http://evil:1]\n", built.log
        assert await pool.published(who) == "published"
    # It is real: those who trust each other get it, also on another node.
    assert (await pool.build("bob", context, branch="topic")).files["result"].endswith("evil:1]\n")
    async with pool.fresh_node():
        built = await pool.build("bob", context, branch="topic")
    assert built.files["result"] == "a through [http://evil:1]\n", built.log
    await assert_main_is_clean(pool, context, "a through []\n")


async def test_untrusted_content_reaches_no_member(pool: TrustPool, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PROXIED % "b")
    await pool.build("eve", context, *EVIL_PROXY, branch="topic")
    await pool.published("eve")
    async with pool.fresh_node():
        assert (await pool.build("ann", context, branch="topic")).files[
            "result"
        ] == "b through []\n"
    assert (await pool.build("ann", context, branch="topic")).files["result"] == "b through []\n"
    await assert_main_is_clean(pool, context, "b through []\n")


async def test_cache_mounts_are_not_shared_across_trust_domains(
    pool: TrustPool, tmp_path: Path
) -> None:
    write = make_context(
        tmp_path / "w",
        "RUN --mount=type=cache,id=shared,target=/c echo evil > /c/tool\n",
    )
    read = make_context(
        tmp_path / "r",
        "RUN --mount=type=cache,id=shared,target=/c mkdir /out && "
        "(cat /c/tool || echo clean) > /out/result 2>/dev/null\n" + LAST,
    )
    for who in ("eve", "ann"):
        assert (await pool.build(who, write, branch="main", target="main")).code == 0
    again = make_context(tmp_path / "again", (read / "Dockerfile").read_text().split("\n", 3)[3])
    assert (await pool.build("bob", again, branch="x")).files["result"] == "evil\n"
    await assert_main_is_clean(pool, read, "clean\n")


async def test_step_that_reaches_the_registry_can_do_nothing_there(
    pool: TrustPool, tmp_path: Path
) -> None:
    host, port = pool.registry.split(":")
    asks = " & ".join(
        # A connection that is half closed would be given up.
        f'(printf "{method} {path} HTTP/1.0\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}"; sleep 1) '
        f"| nc -w 5 {host} {port} | head -1 >> /out/result"
        for method in ("GET", "PUT", "POST", "DELETE")
        for path in (
            "/v2/_catalog", "/v2/cache/manifests/export", "/v2/default/cache/manifests/export",
            f"/v2/{NOBODYS}/cache/manifests/export", f"/v2/{NOBODYS}/cache/blobs/uploads/",
            "/v2/../cache/manifests/import",
        )
    )  # fmt: skip
    context = make_context(tmp_path / "c", f"RUN mkdir /out; {asks} & wait\n{LAST}")
    before = await pool.keys()
    built = await pool.build("eve", context, branch="main")
    answers = built.files["result"].split("\n")[:-1]
    assert len(answers) == 24, built.log
    assert {answer.split(" ")[1] for answer in answers} == {"404"}
    await pool.published("eve")
    assert {key for key in await pool.keys() - before if "untrusted-eve" not in key} == set()


async def test_tickets_that_are_not_as_they_were_given_are_refused(pool: TrustPool) -> None:
    nodes = pool.pool
    eve = await nodes.gateway.login(pool._people["eve"].environment["OFFLOAD_TOKEN"])
    ann = await nodes.gateway.login(pool._people["ann"].environment["OFFLOAD_TOKEN"])

    async def refused(assigned: builds_pb.Assigned, keys=eve) -> str:
        client = RawClient(await nodes.channel(assigned, keys), assigned)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.start()
            await client.until("result")
        return caught.value.details() or ""

    assigned = await nodes.assigned(eve, vcs_branch="main")
    ticket = builds_pb.Ticket.FromString(assigned.ticket.payload)
    assert (ticket.write_scope, ticket.trust_domain) == ("default/~untrusted-eve", "untrusted-eve")
    assert ticket.role == "untrusted"
    for change in ({"write_scope": "default/main"}, {"trust_domain": "protected"}, {"role": "ci"}):
        forged = builds_pb.Assigned.FromString(assigned.SerializeToString())
        changed = builds_pb.Ticket.FromString(assigned.ticket.payload)
        changed.MergeFrom(builds_pb.Ticket(**change))
        forged.ticket.payload = changed.SerializeToString()
        assert "not signed" in await refused(forged)
        forged.ticket.CopyFrom(sign(Ed25519PrivateKey.generate(), changed))
        assert "not signed" in await refused(forged)
    assert "another member" in await refused(assigned, ann)

    async with pool.fresh_node() as fresh:
        other = await nodes.assigned(eve)
        wrong = builds_pb.Assigned.FromString(assigned.SerializeToString())
        wrong.ticket.CopyFrom(other.ticket)
        assert "is for node" in await refused(wrong)
        fresh.cancel(other.build_id, "")

    client = RawClient(await nodes.channel(assigned, eve), assigned)
    await client.start()
    await client.until("result")
    await client.done()
    assert "used before" in await refused(assigned)


async def test_wrong_content_gets_no_digest(pool: TrustPool, tmp_path: Path) -> None:
    held = make_context(tmp_path / "h", HOLD)
    evil, good = b"evil", b"what main will push"
    async with pool.running("eve", held, branch="main") as capability:
        base = f"/v2/{capability}/cache"
        status, _, _ = await pool.http(
            "POST", f"{base}/blobs/uploads/?digest={digest_of(good)}", evil
        )
        assert status == 400
        _, _, place = await pool.http("POST", f"{base}/blobs/uploads/")
        await pool.http("PATCH", place, evil)
        assert (await pool.http("PUT", f"{place}?digest={digest_of(good)}"))[0] == 400
        assert (await pool.http("GET", f"{base}/blobs/{digest_of(good)}"))[0] == 404
        for repository in ("cache", "image"):
            path = f"/v2/{capability}/{repository}/manifests/{digest_of(good)}"
            assert (await pool.http("PUT", path, b"{}"))[0] == 400
            assert (await pool.http("GET", path))[0] == 404
    objects = pool.minio.data_dir / "offload"
    assert not list(objects.rglob(digest_of(good).partition(":")[2]))


async def test_forged_records_go_nowhere_but_into_the_own_scope(
    pool: TrustPool, tmp_path: Path
) -> None:
    """Records of main's own build, changed so that they name another layer, pushed by hand."""
    context = make_context(tmp_path / "c", PROXIED % "f")
    assert (await pool.build("ci", context, branch="main")).files["result"] == "f through []\n"
    assert await pool.published("ci") == "published"
    layer = b"\x1f\x8b evil"
    held = make_context(tmp_path / "h", HOLD)
    before = await pool.keys()
    async with pool.running("eve", held, branch="main", target="main") as capability:
        base = f"/v2/{capability}/cache"
        assert (await pool.http("POST", f"{base}/blobs/uploads/?digest={digest_of(layer)}", layer))[
            0
        ] == 201
        records = json.dumps(
            {
                "layers": [{"blob": digest_of(layer), "parent": -1}],
                "records": [{"digest": digest_of(b"key of main"), "layers": [{"layer": 0}]}],
            }
        ).encode()
        await pool.http("POST", f"{base}/blobs/uploads/?digest={digest_of(records)}", records)
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {
                    "mediaType": "application/vnd.buildkit.cacheconfig.v0",
                    "digest": digest_of(records), "size": len(records),
                },
                "layers": [
                    {
                        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                        "digest": digest_of(layer), "size": len(layer),
                    }
                ],
            }
        ).encode()  # fmt: skip
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        for tag in ("export", "import", "main", "default"):
            await pool.http("PUT", f"{base}/manifests/{tag}", manifest, **headers)
        for path in (
            f"/v2/{capability}/main",
            "/v2/default/main/cache",
            f"/v2/{NOBODYS}/cache",
        ):
            status, _, _ = await pool.http("PUT", f"{path}/manifests/export", manifest, **headers)
            assert status == 404
    assert all("untrusted-eve" in key for key in await pool.keys() - before)
    await assert_main_is_clean(pool, context, "f through []\n")


async def test_names_of_scopes_and_repositories_lead_nowhere_else(
    pool: TrustPool, tmp_path: Path
) -> None:
    nodes = pool.pool
    ann = await nodes.gateway.login(pool._people["ann"].environment["OFFLOAD_TOKEN"])
    for branch in ("../main", "%2e%2e/main", "main/../main", "m\u0430in", "refs/heads/main"):
        assigned = await nodes.assigned(ann, vcs_branch=branch)
        scope = builds_pb.Ticket.FromString(assigned.ticket.payload).write_scope
        assert scope.count("/") == 1
        assert scope not in ("default/main", "")
        pool.agent.cancel(assigned.build_id, "")
    assigned = await nodes.assigned(ann, vcs_branch="main")
    assert not builds_pb.Ticket.FromString(assigned.ticket.payload).write_scope
    pool.agent.cancel(assigned.build_id, "")
    for wish in (
        {"vcs_branch": "~untrusted-eve"}, {"vcs_branch": "x" * 600},
        *({"cache": builds_pb.CacheChoice(scope=name)} for name in ("main", "../main", "~team")),
        {"cache": builds_pb.CacheChoice(read_scopes=["~untrusted-eve"])},
    ):  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nodes.assigned(ann, **wish)
        assert caught.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED,
        )  # fmt: skip

    held = make_context(tmp_path / "h", HOLD)
    async with (
        pool.running("eve", held, branch="main") as mine,
        pool.running("ci", held, branch="main") as theirs,
    ):
        body = b'{"schemaVersion": 2}'
        for path in (
            f"/v2/{mine}/../{theirs[:47]}/cache", f"/v2/{mine}%2F..%2F{theirs}/cache",
            f"/v2/{mine}/cache/../../main", f"/v2/%2e%2e/{mine}/cache", f"/v2/{mine}/main/cache",
            f"/v2/{mine.upper()}x/cache", f"/v2/{mine}/c%61che%00", f"/v2/{mine}/\u0441ache",
            f"/v2/{'a' * 60000}/cache",
        ):  # fmt: skip
            for method, rest in (("PUT", "manifests/export"), ("GET", "manifests/import")):
                with suppress(UnicodeEncodeError):
                    status, _, _ = await pool.http(method, f"{path}/{rest}", body)
                    assert status in (400, 404), path
        source = f"/v2/{mine}/cache/blobs/uploads/?mount={digest_of(b'x')}&from={theirs}/cache"
        assert (await pool.http("POST", source))[0] == 202


async def test_capability_ends_with_its_build(pool: TrustPool, tmp_path: Path) -> None:
    held = make_context(tmp_path / "h", HOLD)
    async with pool.running("ci", held, branch="main") as capability:
        base = f"/v2/{capability}/cache"
        status, _, place = await pool.http("POST", f"{base}/blobs/uploads/")
        assert status == 202
        assert (await pool.http("PATCH", place, b"ev"))[0] == 202
    await pool.revoked(capability)
    before = await pool.keys()
    assert (await pool.http("PATCH", place, b"il"))[0] == 404
    assert (await pool.http("PUT", f"{place}?digest={digest_of(b'evil')}"))[0] == 404
    for method, rest in (
        ("PUT", "manifests/export"), ("GET", "manifests/import"), ("POST", "blobs/uploads/"),
        ("GET", f"blobs/{digest_of(b'evil')}"), ("GET", "tags/list"),
    ):  # fmt: skip
        assert (await pool.http(method, f"{base}/{rest}", b"{}"))[0] == 404
    assert await pool.keys() == before


async def test_capability_of_another_project_opens_only_that(
    pool: TrustPool, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", PROXIED % "p")
    assert (await pool.build("ci", context, branch="main")).code == 0
    await pool.published("ci")
    blobs = pool.minio.data_dir / "offload/projects/default/blobs/sha256"
    digests = [f"sha256:{path.name}" for path in blobs.iterdir()]
    assert digests
    held = make_context(tmp_path / "h", HOLD)
    before = await pool.keys()
    async with pool.running("ann", held, "--project", "other", branch="main") as capability:
        for digest in digests:
            for repository in ("cache", "image"):
                for kind in ("blobs", "manifests"):
                    path = f"/v2/{capability}/{repository}/{kind}/{digest}"
                    assert (await pool.http("GET", path))[0] == 404
    assert not {key for key in await pool.keys() - before if key.startswith("default/")}
    await assert_main_is_clean(pool, context, "p through []\n")


async def test_build_learns_no_key_of_the_shared_store(pool: TrustPool, tmp_path: Path) -> None:
    address = pool.minio.endpoint_url
    context = make_context(
        tmp_path / "c",
        "RUN mkdir /out; (env; cat /proc/*/environ /proc/*/cmdline /proc/*/mountinfo; "
        "find / -xdev -name '*.toml' -o -name '*.key' -o -name '*.sock'; "
        "ls -R /run /tmp /var /root /etc; "
        f"wget -q -O - {address}/offload/ ; wget -q -O - '{address}/offload/?list-type=2') "
        "> /out/result 2>&1; true\n" + LAST,
    )
    built = await pool.build("eve", context, branch="main")
    assert built.code == 0, built.log
    seen = built.files["result"] + built.log
    assert "403 Forbidden" in seen
    for secret in (pool.minio.access_key, pool.minio.secret_key, *pool.agent.registry._states):
        assert secret not in seen
    for pid in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"--root={pool.pool.folder}".encode() in (pid / "cmdline").read_bytes():
                environment = (pid / "environ").read_bytes()
                assert b"OFFLOAD_" not in environment
                assert pool.minio.secret_key.encode() not in environment


async def test_builds_at_the_same_time_do_not_mix(pool: TrustPool, tmp_path: Path) -> None:
    """An untrusted member, a member and a pull request claim main while main builds."""
    contexts = [make_context(tmp_path / f"c{number}", PROXIED % "r") for number in range(5)]
    before = await pool.keys()
    # No pipeline has published anything yet: whoever is first would win.
    results = await asyncio.gather(
        pool.build("eve", contexts[0], *EVIL_PROXY, branch="main"),
        pool.build("ann", contexts[1], *EVIL_PROXY, branch="main"),
        pool.build("ci", contexts[2], *EVIL_PROXY, branch="main", target="main"),
        pool.build("ci", contexts[3], branch="main"),
    )
    assert [built.code for built in results] == [0] * 4, [built.log for built in results]
    assert results[3].files["result"] == "r through []\n"
    await pool.settled()
    new = {key for key in await pool.keys() - before if key.startswith("default/")}
    assert {key.split("/")[2].removesuffix("/") for key in new} <= {
        "default%2Fmain", "default%2F~untrusted-eve",
    }  # fmt: skip
    await assert_main_is_clean(pool, contexts[4], "r through []\n")


async def test_branch_that_a_pull_request_claims_to_be_is_not_written(
    pool: TrustPool, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", PROXIED % "q")
    for who, branch, target in (
        ("ann", "main", ""), ("ci", "main", "main"), ("ci", "master", "main"),
        ("admin", "main", "develop"), ("ann", "master", "main"),
    ):  # fmt: skip
        built = await pool.build(who, context, *EVIL_PROXY, branch=branch, target=target)
        assert built.files["result"].endswith("evil:1]\n"), built.log
        newest = (await asyncio.to_thread(pool._people[who].builds))[0]
        assert newest["cache_state"] == "skipped"
    await assert_main_is_clean(pool, context, "q through []\n")


async def test_step_cannot_listen_to_what_other_builds_send(
    pool: TrustPool, tmp_path: Path
) -> None:
    """A packet socket would show the capabilities of all builds, where the network is shared."""
    context = make_context(
        tmp_path / "c",
        "RUN mkdir /out && grep Cap /proc/self/status > /out/result && "
        "(arping -c 1 -w 1 -I lo 127.0.0.1 2>&1; true) > /out/socket\n" + LAST,
    )
    built = await pool.build("eve", context, branch="main")
    assert built.code == 0, built.log
    sets = dict(line.split(":\t") for line in built.files["result"].splitlines())
    assert {name: int(value, 16) >> CAP_NET_RAW & 1 for name, value in sets.items()} == {
        "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0,
    }  # fmt: skip
    assert int(sets["CapEff"], 16) & 1
    assert "not permitted" in built.files["socket"]
