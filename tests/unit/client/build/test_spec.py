"""From options to the request for the node."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_client.build.callrequest import CallRequest
from offload_client.build.contextfiles import ContextFiles, find_context
from offload_client.build.options import BuildOptions, OutputOption
from offload_client.build.spec import build_spec, effective_outputs
from offload_client.build.stepoptions import Resources, StepOptions
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import InvalidValueError
from offload_proto.v1.build_spec_pb2 import BuildSpec, ResourceLimits


@pytest.fixture
def files(tmp_path: Path) -> ContextFiles:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    environment = {"HOME": str(tmp_path / "home")}
    invocation = Invocation([], tmp_path, environment, 0, text_stream(1), text_stream(2))
    return find_context(invocation, BuildOptions("."))


def spec_of(options: BuildOptions, files: ContextFiles, **more: str) -> BuildSpec:
    return build_spec(options, effective_outputs(options), files, **more)


def test_step_options_have_their_fields(files: ContextFiles) -> None:
    steps = StepOptions(
        network="host", hosts=["a=1.2.3.4"], ulimits=["core=1:1"], shm_size_bytes=9,
        cgroup_parent="p", resources=Resources(memory_bytes=7, cpuset_cpus="0"),
    )  # fmt: skip
    spec = spec_of(BuildOptions(".", steps=steps, no_cache_stages=["s"]), files)
    # Who asks for the machine's network also asks for the right to it.
    assert (spec.network_mode, list(spec.entitlements)) == ("host", ["network.host"])
    assert list(spec.extra_hosts) == ["a=1.2.3.4"]
    assert list(spec.ulimits) == ["core=1:1"]
    assert (spec.shm_size_bytes, spec.cgroup_parent) == (9, "p")
    assert spec.resources == ResourceLimits(memory_bytes=7, cpuset_cpus="0")
    assert list(spec.no_cache_stages) == ["s"]
    plain = spec_of(BuildOptions("."), files)
    assert not plain.HasField("resources")
    assert not plain.entitlements


def test_annotations_go_to_images_only(files: ContextFiles) -> None:
    outputs = [OutputOption("local", "out"), OutputOption("oci", "x", {"a": "b"})]
    options = BuildOptions(".", outputs=outputs, annotations={"annotation.k": "v"})
    spec = spec_of(options, files)
    assert [dict(output.attributes) for output in spec.outputs] == [
        {}, {"a": "b", "annotation.k": "v"},
    ]  # fmt: skip


def test_call_makes_nothing(files: ContextFiles) -> None:
    options = BuildOptions(
        ".", call=CallRequest("lint"), metadata_file="m", tags=["docker.io/library/a:1"],
        outputs=[OutputOption("registry")],
    )  # fmt: skip
    spec = spec_of(options, files, provenance="min")
    assert spec.call == "frontend.lint"
    assert not spec.outputs
    assert not spec.metadata_provenance


def test_provenance_is_only_wanted_for_a_metadata_file(files: ContextFiles) -> None:
    assert spec_of(BuildOptions(".", metadata_file="m"), files, provenance="max") \
        .metadata_provenance == "max"  # fmt: skip
    assert not spec_of(BuildOptions("."), files, provenance="max").metadata_provenance


def test_docker_archive_cannot_hold_attestations() -> None:
    archive = [OutputOption("docker", "x")]
    with pytest.raises(InvalidValueError, match="manifest lists"):
        effective_outputs(BuildOptions(".", outputs=archive, attestations={"sbom": ""}))
    without = BuildOptions(".", outputs=archive, attestations={"sbom": "disabled=true"})
    assert effective_outputs(without) == archive
