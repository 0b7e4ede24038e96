"""What the flags of `docker buildx build` do to a build on real nodes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.node import TOOLS
from tests.fixtures.pool import Pool
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

SCANNER = """\
COPY scan /bin/scan
ENTRYPOINT ["/bin/sh", "/bin/scan"]
"""
SCAN = """\
cat > "$BUILDKIT_SCAN_DESTINATION/sbom.spdx.json" <<END
{"_type": "https://in-toto.io/Statement/v0.1", "predicateType": "https://spdx.dev/Document",
"predicate": {"spdxVersion": "SPDX-2.3"}}
END
"""
STAGES = """\
FROM base AS first
RUN cat /proc/sys/kernel/random/uuid > /first
FROM base AS second
RUN cat /proc/sys/kernel/random/uuid > /second
FROM scratch
COPY --from=first /first /
COPY --from=second /second /
"""
ATTESTATION = "vnd.docker.reference.type"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry"), auth={}) as running:
        yield running


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1) as running:
        yield running


@pytest.fixture(scope="module")
def member(pool: Pool) -> Member:
    return pool.member()


def worked(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stderr


def manifest(registry: DockerRegistry, name: str, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = registry.get(f"/v2/{name}/manifests/{reference}")
    return found


def statements(registry: DockerRegistry, name: str, index: dict[str, Any]) -> dict[str, str]:
    """Return what is attested of an image: predicate type and content."""
    (entry,) = [item for item in index["manifests"] if item.get("annotations", {}).get(ATTESTATION)]
    found = {}
    for layer in manifest(registry, name, entry["digest"])["layers"]:
        url = f"http://{registry.address}/v2/{name}/blobs/{layer['digest']}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found[layer["annotations"]["in-toto.io/predicate-type"]] = answer.read().decode()
    return found


def layout(path: Path) -> tuple[dict[str, Any], tarfile.TarFile]:
    archive = tarfile.open(path)  # noqa: SIM115 - closed by the caller
    return json.load(archive.extractfile("index.json")), archive  # type: ignore[arg-type]


def blob(archive: tarfile.TarFile, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.load(
        archive.extractfile(f"blobs/{digest.replace(':', '/')}")  # type: ignore[arg-type]
    )
    return found


def test_flags_for_steps_reach_the_steps(member: Member, tmp_path: Path) -> None:
    steps = (
        "RUN cat /etc/hosts && df -k /dev/shm && echo files $(ulimit -n) $(ulimit -Hn)"
        " && cat /proc/self/cgroup\n"
    )
    seen = worked(member.build(
        "--add-host", "one.example:10.1.2.3,two.example=[fe80::7]", "--shm-size", "7m",
        "--ulimit", "nofile=123:456", "--cgroup-parent", "mine",
        make_context(tmp_path / "c", steps),
    ))  # fmt: skip
    assert "10.1.2.3\tone.example" in seen
    assert "fe80::7\ttwo.example" in seen
    assert " 7168 " in seen
    assert "files 123 456" in seen
    assert "/offload/mine/buildkit/" in seen


def test_network_none_leaves_only_the_loopback_device(member: Member, tmp_path: Path) -> None:
    steps = "RUN echo devices $(ls /sys/class/net)\n"
    seen = worked(member.build("--network", "none", make_context(tmp_path / "c", steps)))
    assert "devices lo\n" in seen


def test_resources_bound_the_steps(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN dd if=/dev/zero of=/dev/null bs=200M count=1\n")
    bound = member.build("--no-cache", "--resource", "memory=64m,memory-swap=64m", context)
    assert bound.returncode == 9
    assert "dd if=/dev/zero" in bound.stderr
    worked(member.build("--resource", "memory=600m,cpu-shares=512,cpuset-cpus=0", context))


def test_no_cache_filter_builds_only_the_named_stage_anew(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c")
    dockerfile = context / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text().replace("scratch", "scratch AS base") + STAGES)

    def build(*flags: str) -> str:
        return worked(member.build(*flags, "-o", tmp_path / "out", context))

    build()
    seen = build("--no-cache-filter", "first")
    states = dict(re.findall(r"^#(\d+) (CACHED|DONE)", seen, re.MULTILINE))
    steps = dict(re.findall(r"^#(\d+) \[(first|second) 1/1\] RUN", seen, re.MULTILINE))
    # BuildKit does not even look at what only leads to steps whose results it has.
    ran = {stage for number, stage in steps.items() if states[number] == "DONE"}
    assert ran == {"first"}
    build("--target", "first")
    before = (tmp_path / "out" / "first").read_text()
    build("--target", "first", "--no-cache-filter", "second,other")
    assert (tmp_path / "out" / "first").read_text() == before
    build("--target", "first", "--no-cache-filter", "first")
    assert (tmp_path / "out" / "first").read_text() != before
    both = member.build("--no-cache", "--no-cache-filter", "first", context)
    assert both.returncode == 1
    assert "--no-cache and --no-cache-filter cannot" in both.stderr


def test_annotations_stand_in_manifest_and_index(
    member: Member, registry: DockerRegistry, tmp_path: Path
) -> None:
    archive = tmp_path / "image.tar"
    context = make_context(tmp_path / "c")
    worked(member.build(
        "--annotation", "plain=1", "--annotation", "manifest:all=3",
        "-o", f"type=oci,dest={archive}", context,
    ))  # fmt: skip
    index, files = layout(archive)
    with files:
        found = blob(files, index["manifests"][0]["digest"])["annotations"]
    assert found == {"plain": "1", "all": "3"}
    name = f"{registry.address}/annotated:1"
    worked(member.build(
        "--annotation", "index:where=index", "--annotation", "manifest[linux/amd64]:here=2",
        "-t", name, "--push", context,
    ))  # fmt: skip
    index = manifest(registry, "annotated", "1")
    assert index["annotations"] == {"where": "index"}
    image = manifest(registry, "annotated", index["manifests"][0]["digest"])
    assert image["annotations"] == {"here": "2"}
    # There is no index without an attestation.
    plain = member.build(
        "--annotation", "index:a=b", "--provenance=false", "-t", name, "--push", context
    )
    assert plain.returncode == 1
    assert "index annotations not supported for single platform export" in plain.stderr


def test_pushed_images_have_provenance_unless_it_is_turned_off(
    member: Member, registry: DockerRegistry, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c")
    name = f"{registry.address}/attested"
    worked(member.build("-t", f"{name}:default", "--push", context))
    index = manifest(registry, "attested", "default")
    (text,) = statements(registry, "attested", index).values()
    assert json.loads(text)["predicateType"].startswith("https://slsa.dev/provenance/")
    # Neither the pool's registry nor the build's capability for it may be told.
    assert "cache-imports" not in text
    assert "127.0.0.1:" not in text.replace(registry.address, ""), text

    worked(member.build("-t", f"{name}:off", "--push", "--provenance=false", context))
    assert "layers" in manifest(registry, "attested", "off")
    worked(member.build(
        "-t", f"{name}:none", "--push", context, BUILDX_NO_DEFAULT_ATTESTATIONS="1",
    ))  # fmt: skip
    assert "layers" in manifest(registry, "attested", "none")


def test_image_of_the_pool_has_attestations_only_when_asked(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c")
    archive = tmp_path / "image.tar"
    for flags, expected in (((), 1), (("--provenance", "mode=max"), 2)):
        worked(member.build(
            *flags, "-t", "kept:1", "-o", f"type=oci,dest={archive}", "--metadata-file",
            tmp_path / "m.json", context,
        ))  # fmt: skip
        index, files = layout(archive)
        with files:
            (top,) = index["manifests"]
            content = blob(files, top["digest"])
        assert len(content.get("manifests", [top])) == expected
    refused = member.build("--sbom=true", "-o", f"type=docker,dest={archive}", context)
    assert refused.returncode == 1
    assert "manifest lists; use type=oci" in refused.stderr


def test_sbom_comes_from_the_scanner_that_is_asked_for(
    member: Member, registry: DockerRegistry, tmp_path: Path
) -> None:
    scanner = f"{registry.address}/scanner:1"
    worked(member.build(
        "-t", scanner, "--push", "--provenance=false",
        make_context(tmp_path / "scanner", SCANNER, scan=SCAN),
    ))  # fmt: skip
    name = f"{registry.address}/listed:1"
    context = make_context(tmp_path / "c")
    worked(member.build("--sbom", f"generator={scanner}", "-t", name, "--push", context))
    found = statements(registry, "listed", manifest(registry, "listed", "1"))
    listed = json.loads(found["https://spdx.dev/Document"])
    assert listed["predicate"]["spdxVersion"] == "SPDX-2.3"
    assert len(found) == 2
    missing = member.build("--sbom", "generator=127.0.0.1:1/none", "-t", name, "--push", context)
    assert missing.returncode == 1
    assert "127.0.0.1:1/none" in missing.stderr


def test_check_lists_findings_and_fails(member: Member, tmp_path: Path) -> None:
    good = make_context(tmp_path / "good")
    clean = member.build("--check", good)
    assert (clean.returncode, clean.stdout) == (0, "Check complete, no warnings found.\n")
    bad = make_context(tmp_path / "bad", "MAINTAINER me\nCMD echo hi\n")
    found = member.build("--call=check", "bad", cwd=tmp_path)
    assert found.returncode == 1
    assert found.stdout.startswith("Check complete, 2 warnings have been found!\n\nWARNING: ")
    assert "bad/Dockerfile:4\n--------------------\n" in found.stdout
    assert ">>> MAINTAINER me" in found.stdout
    ignored = member.build("--call", "check,format=json,ignorestatus=true", bad)
    assert ignored.returncode == 0
    rules = {warning["ruleName"] for warning in json.loads(ignored.stdout)["warnings"]}
    assert rules == {"MaintainerDeprecated", "JSONArgsRecommended"}
    wrong = member.build("--check", make_context(tmp_path / "wrong", "NONSENSE\n"))
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "unknown instruction: NONSENSE" in wrong.stderr


def test_outline_and_targets_are_printed_and_nothing_is_built(
    member: Member, tmp_path: Path
) -> None:
    steps = "ARG VERSION=3\nRUN exit 1\nFROM scratch AS final\n"
    context = make_context(tmp_path / "c", steps)
    dockerfile = context / "Dockerfile"
    text = dockerfile.read_text().replace("scratch\n", "scratch AS base\n", 1)
    dockerfile.write_text(f"# syntax is not asked for\n{text}")
    targets = member.build("--call", "targets", "-o", tmp_path / "out", context)
    assert targets.returncode == 0, targets.stderr
    assert targets.stdout.splitlines() == [
        "TARGET            DESCRIPTION", "base", "final (default)",
    ] or "final (default)" in targets.stdout  # fmt: skip
    assert not (tmp_path / "out").exists()
    outline = member.build("--print=outline", "--target", "base", context)
    assert outline.returncode == 0, outline.stderr
    assert "TARGET: base" in outline.stdout
    assert "VERSION" in outline.stdout
    parsed = member.build(
        "--call", "outline,format=json", "--target=base", "--metadata-file", tmp_path / "m.json",
        context,
    )  # fmt: skip
    assert json.loads(parsed.stdout)["args"][0]["value"] == "3"
    metadata = json.loads((tmp_path / "m.json").read_text())
    assert metadata["result.json"]["name"] == "base"
    assert "buildx.build.ref" not in metadata
    unknown = member.build("--call", "nosuchthing", context)
    assert unknown.returncode == 1
    assert "unsupported request frontend.nosuchthing" in unknown.stderr


@pytest.fixture(scope="module")
def frontend(
    member: Member, registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return the name of an image with the Dockerfile's frontend."""
    name = f"{registry.address}/frontend:1"
    context = tmp_path_factory.mktemp("frontend")
    shutil.copy(TOOLS / "dockerfile-frontend", context)
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY dockerfile-frontend /bin/\n"
        "LABEL moby.buildkit.frontend.caps="
        "moby.buildkit.frontend.subrequests,moby.buildkit.frontend.contexts\n"
        'ENTRYPOINT ["/bin/dockerfile-frontend"]\n'
    )
    worked(member.build("-t", name, "--push", "--provenance=false", context))
    return name


def test_syntax_line_and_build_argument_choose_the_frontend(
    member: Member, frontend: str, tmp_path: Path
) -> None:
    steps = "ARG WHO=nobody\nRUN echo hello $WHO\n"
    context = make_context(tmp_path / "c", steps)
    dockerfile = context / "Dockerfile"
    plain = dockerfile.read_text()
    dockerfile.write_text(f"# syntax={frontend}\n{plain}")
    seen = worked(member.build("--build-arg", "WHO=syntax", context))
    assert f"docker-image://{frontend}" in seen
    assert "hello syntax" in seen
    outline = member.build("--call=outline", context)
    assert outline.returncode == 0, outline.stderr
    assert "WHO" in outline.stdout
    dockerfile.write_text(plain)
    argument = f"BUILDKIT_SYNTAX={frontend}"
    seen = worked(member.build("--build-arg", argument, "--build-arg", "WHO=argument", context))
    assert "hello argument" in seen
    dockerfile.write_text(f"# syntax=127.0.0.1:1/none:1\n{plain}")
    missing = member.build(context)
    assert missing.returncode == 1
    assert "127.0.0.1:1/none:1" in missing.stderr


def test_metadata_file_has_buildx_keys(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "MAINTAINER me\n")
    file = tmp_path / "m.json"

    def build(**environment: str) -> dict[str, Any]:
        worked(member.build("-t", "meta:1", "--metadata-file", file, context, **environment))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    metadata = build(BUILDX_METADATA_WARNINGS="1")
    assert set(metadata) == {
        "buildx.build.provenance", "buildx.build.ref", "buildx.build.warnings",
        "containerimage.config.digest", "containerimage.descriptor", "containerimage.digest",
        "image.name",
    }  # fmt: skip
    assert metadata["image.name"] == "docker.io/library/meta:1"
    (warning,) = metadata["buildx.build.warnings"]
    assert base64.b64decode(warning["short"]).startswith(b"MaintainerDeprecated")
    provenance = metadata["buildx.build.provenance"]
    assert provenance["buildType"] == "https://mobyproject.org/buildkit@v1"
    assert provenance["invocation"]["configSource"] == {"entryPoint": "Dockerfile"}
    assert "metadata" not in provenance
    assert "buildx.build.warnings" not in build()
    assert "metadata" in build(BUILDX_METADATA_PROVENANCE="max")["buildx.build.provenance"]
    assert "buildx.build.provenance" not in build(BUILDX_METADATA_PROVENANCE="disabled")


def test_several_outputs_at_once(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo made > /made\n")
    worked(member.build(
        "-o", tmp_path / "files", "-o", f"type=tar,dest={tmp_path / 'files.tar'}",
        "-o", f"type=oci,dest={tmp_path / 'oci.tar'}",
        "-o", f"type=docker,dest={tmp_path / 'docker.tar'}", context,
    ))  # fmt: skip
    assert (tmp_path / "files" / "made").read_text() == "made\n"
    with tarfile.open(tmp_path / "files.tar") as archive:
        assert "made" in archive.getnames()
    with tarfile.open(tmp_path / "docker.tar") as archive:
        assert "manifest.json" in archive.getnames()
    index, files = layout(tmp_path / "oci.tar")
    files.close()
    assert len(index["manifests"]) == 1


def test_flags_without_effect_and_flags_that_cannot_be_honoured(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c")
    seen = worked(member.build(
        "--compress", "--rm=false", "--force-rm", "-m", "1g", "--memory-swap=2g", "-c", "5",
        "--cpu-period=1", "--cpu-quota=2", "--cpuset-cpus=0", "--cpuset-mems=0",
        "--isolation=default", "--security-opt=x", "--squash", "--builder=other",
        "--policy=disabled=true", context,
    ))  # fmt: skip
    assert "WARNING: isolation flag is deprecated with BuildKit." in seen
    assert "WARNING: --builder other is ignored" in seen
    assert seen.count("WARNING: ") == 5, seen
    refused = member.build("--policy", "filename=x.rego", context)
    assert refused.returncode == 1
    assert refused.stderr.startswith("ERROR: --policy cannot be honoured")


def test_debug_expands_warnings(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "MAINTAINER me\n")
    assert "More info: " not in worked(member.build("--no-cache", context))
    assert "More info: " in worked(member.build("-D", "--no-cache", context))


def test_source_date_of_the_environment_makes_builds_repeatable(
    member: Member, tmp_path: Path
) -> None:
    def digest(name: str) -> str:
        context = make_context(tmp_path / name)
        worked(member.build(
            "--no-cache", "-o", f"type=oci,dest={tmp_path / name}.tar,rewrite-timestamp=true",
            context, SOURCE_DATE_EPOCH="1700000000",
        ))  # fmt: skip
        index, files = layout(tmp_path / f"{name}.tar")
        files.close()
        return str(index["manifests"][0]["digest"])

    assert digest("one") == digest("two")


def test_quiet_and_metadata_go_to_one_reader(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c")
    result = member.run("offload-build", "--progress=quiet", "-t", "q:1", context)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sha256:")
    silent = member.run("offload-build", "--progress=none", "-t", "q:1", context)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    assert io.StringIO(result.stdout).readline().strip() == result.stdout.strip()
