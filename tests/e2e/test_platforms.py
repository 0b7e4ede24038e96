"""One image for several platforms, each built by the node that is native for it."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.engine import DockerEngine
from tests.fixtures.parity import stock_environment
from tests.fixtures.platformpool import PlatformPool
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.trees import write_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

BOTH = ("--platform", "linux/amd64,linux/arm64")
AMD, ARM = 'platforms = ["linux/amd64"]', 'platforms = ["linux/arm64"]'
EPOCH = "1700000000"
DOCKERFILE = "FROM scratch\nARG TARGETARCH\nLABEL machine=$TARGETARCH\nCOPY f /f\n"


@pytest.fixture(scope="module")
def pool() -> Iterator[PlatformPool]:
    with PlatformPool({"amd": AMD, "arm": ARM}) as running:
        yield running


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def member(pool: PlatformPool, registry: DockerRegistry) -> Member:
    found = pool.member()
    registry.write_login(found.home)
    return found


@pytest.fixture
def context(tmp_path: Path) -> Path:
    write_files(tmp_path / "c", {"Dockerfile": DOCKERFILE, "f": "content\n"})
    return tmp_path / "c"


def platforms(index: dict[str, Any]) -> list[str]:
    return [
        f"{item['platform']['os']}/{item['platform']['architecture']}"
        for item in index["manifests"]
    ]


def test_push_makes_one_index_under_all_tags(
    member: Member, registry: DockerRegistry, context: Path, tmp_path: Path
) -> None:
    name = f"{registry.address}/team/app"
    result = member.build(
        *BOTH, "-t", f"{name}:1", "-t", f"{name}:2", "-t", f"{registry.address}/other:3", "--push",
        "--annotation", "index:org.example.all=yes",
        "--annotation", "manifest[linux/arm64]:org.example.arm=yes",
        "--metadata-file", tmp_path / "m.json", "--iidfile", tmp_path / "iid", context,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    index = registry.get("/v2/team/app/manifests/1")
    assert platforms(index) == ["linux/amd64", "linux/arm64"] + 2 * ["unknown/unknown"]
    assert index["annotations"] == {"org.example.all": "yes"}
    assert registry.get("/v2/team/app/manifests/2") == index
    assert registry.get("/v2/other/manifests/3") == index
    for number, machine in enumerate(("amd64", "arm64")):
        manifest = registry.get(f"/v2/team/app/manifests/{index['manifests'][number]['digest']}")
        config = registry.get(f"/v2/team/app/blobs/{manifest['config']['digest']}")
        assert config["architecture"] == config["config"]["Labels"]["machine"] == machine
        assert ("org.example.arm" in manifest.get("annotations", {})) == (machine == "arm64")
        note = index["manifests"][number + 2]["annotations"]
        assert note["vnd.docker.reference.digest"] == index["manifests"][number]["digest"]
    metadata = json.loads((tmp_path / "m.json").read_text())
    assert metadata["containerimage.digest"] == (tmp_path / "iid").read_text()
    assert metadata["containerimage.descriptor"]["digest"] == metadata["containerimage.digest"]
    assert metadata["containerimage.descriptor"]["mediaType"] == index["mediaType"]
    assert {f"buildx.build.provenance/{item}" for item in BOTH[1].split(",")} <= metadata.keys()
    assert metadata["image.name"].count(",") == 2
    pushed = registry.get(f"/v2/team/app/manifests/{metadata['containerimage.digest']}")
    assert pushed == index


def test_the_parts_are_told_apart_in_the_history_and_in_the_log(
    member: Member, context: Path
) -> None:
    result = member.build(*BOTH, "-t", "parts:1", context)
    assert result.returncode == 0, result.stderr
    assert "[linux/amd64 internal] load build definition" in result.stderr
    assert "[linux/arm64 internal] load build definition" in result.stderr
    assert "[linux/arm64 1/1] COPY f /f" in result.stderr
    first, second = member.builds()[:2]
    assert first["group_id"] == second["group_id"] != ""
    assert {first["node_id"]: first["platforms"], second["node_id"]: second["platforms"]} == {
        "amd": ["linux/amd64"], "arm": ["linux/arm64"]
    }  # fmt: skip
    table = member.offload("builds").stdout
    assert "parts:1 [linux/amd64]" in table and "parts:1 [linux/arm64]" in table


def test_the_index_is_the_one_that_stock_buildx_makes(
    member: Member, registry: DockerRegistry, context: Path, tmp_path: Path
) -> None:
    flags = (
        *BOTH, "--provenance=false", "--build-arg", f"SOURCE_DATE_EPOCH={EPOCH}", "-o",
        "type=image,push=true,rewrite-timestamp=true,oci-mediatypes=true",
        "--annotation", "index:org.example.all=<yes>",
        "--annotation", "manifest-descriptor[linux/arm64]:org.example.one=1",
    )  # fmt: skip
    ours = member.build(*flags, "-t", f"{registry.address}/parity:ours", context)
    assert ours.returncode == 0, ours.stderr
    home = tmp_path / "home"
    with Buildkitd(tmp_path / "a") as one, Buildkitd(tmp_path / "b") as other:
        stock = stock_environment(home, TOOLS / "buildx", one.address)
        registry.write_login(home)
        two = {**stock, "BUILDX_BUILDER": "two"}
        for more in (("--platform", "linux/amd64", one.address),
                     ("--append", "--platform", "linux/arm64", other.address)):  # fmt: skip
            command = ["docker", "buildx", "create", "--name", "two", "--driver", "remote", *more]
            subprocess.run(command, env=stock, check=True, capture_output=True, timeout=60)
        for tag, environment in (("one", stock), ("two", two)):
            done = subprocess.run(
                ["docker", "buildx", "build", *flags, "-t", f"{registry.address}/parity:{tag}",
                 str(context)],
                env=environment, capture_output=True, text=True, timeout=100,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    found = {tag: registry.get(f"/v2/parity/manifests/{tag}") for tag in ("ours", "one", "two")}
    # To the byte what one BuildKit makes; buildx with two nodes leaves annotations of the index
    # to another place in the same document.
    assert found["ours"] == found["one"]
    assert found["ours"]["manifests"] == found["two"]["manifests"]
    text = json.dumps(found["one"], indent=2, ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e")
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert digest in ours.stderr
    assert registry.get(f"/v2/parity/manifests/{digest}") == found["one"]


def test_load_brings_all_platforms_into_an_engine_with_containerds_store(
    pool: PlatformPool, context: Path, tmp_path: Path
) -> None:
    with DockerEngine("containerd") as engine:
        member = pool.member(DOCKER_HOST=engine.host)
        result = member.build(
            *BOTH, "-t", "both:1", "--load", "--iidfile", tmp_path / "iid", context
        )
        assert result.returncode == 0, result.stderr
        for machine in ("amd64", "arm64"):
            found = inspected(engine, "--platform", f"linux/{machine}", "both:1")
            assert found["Config"]["Labels"] == {"machine": machine}
        assert (tmp_path / "iid").read_text() == inspected(engine, "both:1")["Id"]
        quiet = member.run("offload-build", "-q", *BOTH, "-t", "both:1", "--load", context)
        assert quiet.stdout.strip() == inspected(engine, "both:1")["Id"], quiet.stderr


def inspected(engine: DockerEngine, *arguments: str) -> dict[str, Any]:
    told = subprocess.run(
        ["docker", "image", "inspect", *arguments],
        env=engine.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    found: dict[str, Any] = json.loads(told.stdout)[0]
    return found


def test_files_go_into_a_folder_per_platform(member: Member, context: Path, tmp_path: Path) -> None:
    result = member.build(
        *BOTH, "-t", "app:1", "-o", tmp_path / "out", "-o", f"type=tar,dest={tmp_path}/t.tar",
        "-o", f"type=oci,dest={tmp_path}/oci.tar", context,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = ["linux_amd64/f", "linux_arm64/f"]
    out = tmp_path / "out"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("f")) == names
    with tarfile.open(tmp_path / "t.tar") as archive:
        assert [item.name for item in archive if item.isreg()] == names
    with tarfile.open(tmp_path / "oci.tar") as archive:
        contents = {
            item.name: archive.extractfile(item).read()  # type: ignore[union-attr]
            for item in archive
            if item.isreg()
        }
    (entry,) = json.loads(contents["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == "docker.io/library/app:1"
    index = json.loads(contents[f"blobs/sha256/{entry['digest'][7:]}"])
    assert platforms(index)[:2] == ["linux/amd64", "linux/arm64"]
    for item in index["manifests"]:
        manifest = json.loads(contents[f"blobs/sha256/{item['digest'][7:]}"])
        for blob in (manifest["config"], *manifest["layers"]):
            assert len(contents[f"blobs/sha256/{blob['digest'][7:]}"]) == blob["size"]


def test_a_failure_on_one_node_ends_the_build_and_names_the_platform(
    member: Member, tmp_path: Path
) -> None:
    dockerfile = "FROM scratch AS amd64\nCOPY f /f\nFROM scratch AS arm64\nCOPY missing /\n"
    dockerfile = f"ARG TARGETARCH\n{dockerfile}FROM $TARGETARCH\n"
    write_files(tmp_path / "c", {"Dockerfile": dockerfile, "f": "x"})
    result = member.build(*BOTH, "-o", tmp_path / "out", tmp_path / "c")
    assert result.returncode == 1
    assert re.search(r"ERROR: .*: linux/arm64: .*missing.*not found", result.stderr), result.stderr


def test_bake_builds_the_platforms_of_a_target_on_their_nodes(
    member: Member, registry: DockerRegistry, context: Path
) -> None:
    (context / "bake.json").write_text(json.dumps({"target": {
        "base": {"platforms": BOTH[1].split(",")},
        "app": {
            "platforms": BOTH[1].split(","), "tags": [f"{registry.address}/baked:1"],
            "contexts": {"base": "target:base"}, "output": ["type=registry"],
            "dockerfile-inline": "FROM base\nCOPY f /g\n",
        },
    }}))  # fmt: skip
    result = member.run("offload-build", "bake", "-f", "bake.json", "app", cwd=context)
    assert result.returncode == 0, result.stderr
    index = registry.get("/v2/baked/manifests/1")
    assert platforms(index)[:2] == ["linux/amd64", "linux/arm64"]


def test_a_platform_that_no_node_builds_is_refused_at_once(member: Member, context: Path) -> None:
    for wanted in ("linux/riscv64", "linux/amd64,linux/riscv64"):
        began = time.monotonic()
        result = member.build("--platform", wanted, context)
        assert time.monotonic() - began < 2.0
        assert result.returncode == 5
        assert (
            "ERROR: no node of this pool builds linux/riscv64; it builds linux/amd64 and "
            "linux/arm64\n" in result.stderr
        )
        assert "QEMU" in result.stderr


def test_detach_is_refused_where_the_parts_must_be_joined(member: Member, context: Path) -> None:
    result = member.build(*BOTH, "--detach", "-t", "x", context)
    assert result.returncode == 1
    assert "--detach" in result.stderr


def test_a_node_that_is_away_is_waited_for_with_the_reason(context: Path) -> None:
    with PlatformPool({"amd": AMD, "arm": ARM}) as pool:
        member = pool.member()
        pool.stop_node("arm")
        process = member.start("--platform", "linux/arm64", context)
        try:
            assert process.stderr is not None
            seen = ""
            while "node arm, which builds linux/arm64, is away" not in seen:
                line = process.stderr.readline()
                assert line, seen
                seen += line
            pool.start_node("arm")
            _, rest = process.communicate(timeout=60)
            assert process.returncode == 0, seen + rest
        finally:
            process.kill()
            process.wait()


def test_a_node_finds_out_what_its_buildkit_builds() -> None:
    with PlatformPool({"own": 'emulated_platforms = ["linux/s390x"]'}) as pool:
        member = pool.member()
        deadline = time.monotonic() + 30
        while True:
            status = json.loads(member.offload("status", "--format", "json").stdout)
            (node,) = status["nodes"]
            if node["emulated_platforms"]:
                break
            assert time.monotonic() < deadline, node
            time.sleep(0.2)
        # What BuildKit lists beside the machine's own name: what its processor runs as well.
        assert len(node["platforms"]) > 1
        assert node["emulated_platforms"][-1] == "linux/s390x"


def test_the_index_is_pushed_with_the_login_of_the_pool(
    registry: DockerRegistry, context: Path, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "registries.toml").write_text(
        f'[registry."{registry.address}"]\nhttp = true\nusername = "{USER}"\n'
        f'password_file = "{tmp_path}/password"\npush = ["**"]\n'
    )
    rules = f'\nregistry_config = "{tmp_path}/registries.toml"'
    with PlatformPool({"amd": AMD + rules, "arm": ARM + rules}) as pool:
        name = f"{registry.address}/pooled:1"
        result = pool.member().build(*BOTH, "-t", name, "--push", context)
        assert result.returncode == 0, result.stderr
        index = registry.get("/v2/pooled/manifests/1")
        assert platforms(index)[:2] == ["linux/amd64", "linux/arm64"]
        assert PASSWORD not in pool.tails()


def test_a_login_that_is_missing_is_told(
    pool: PlatformPool, registry: DockerRegistry, context: Path
) -> None:
    result = pool.member().build(*BOTH, "-t", f"{registry.address}/x:1", "--push", context)
    assert result.returncode == 8, result.stderr


def test_an_archive_on_standard_input_is_read_by_all_nodes(
    member: Member, context: Path, tmp_path: Path
) -> None:
    archive = subprocess.run(["tar", "c", "-C", context, "."], capture_output=True, check=True)
    done = subprocess.run(
        member.command("offload-build", "--progress", "plain", *BOTH, "-o", tmp_path / "out", "-"),
        input=archive.stdout, capture_output=True, timeout=60, env=member.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    for folder in ("linux_amd64", "linux_arm64"):
        assert (tmp_path / "out" / folder / "f").read_text() == "content\n"


def test_an_interrupt_ends_all_parts(member: Member, tmp_path: Path) -> None:
    # A server that takes connections and never answers.
    dockerfile = "FROM scratch\nCOPY --from=late / /\n"
    write_files(tmp_path / "c", {"Dockerfile": dockerfile})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/late.tar"
        process = member.start(*BOTH, "--build-context", f"late={url}", tmp_path / "c")
        deadline = time.monotonic() + 30
        while [build["state"] for build in member.builds()[:2]] != ["running", "running"]:
            assert time.monotonic() < deadline, member.builds()[:2]
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    while {build["state"] for build in member.builds()[:2]} != {"canceled"}:
        assert time.monotonic() < deadline, member.builds()[:2]
        time.sleep(0.2)
