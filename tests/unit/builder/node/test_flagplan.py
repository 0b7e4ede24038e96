"""Flags for steps, attestations and calls on their way into BuildKit."""

from __future__ import annotations

import base64
import json

import pytest

from offload_builder.node.flagplan import (
    attestation_attributes,
    check_flags,
    flag_attributes,
)
from offload_builder.node.provenance import metadata_entries
from offload_builder.node.solveplan import exporters, frontend_attributes
from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import BuildSpec, Output, ResourceLimits


def spec(**values) -> BuildSpec:
    return BuildSpec(**{"dockerfile_path": "Dockerfile"} | values)


def test_every_flag_has_its_attribute():
    given = spec(
        extra_hosts=["a=1.2.3.4", "b=::1"],
        ulimits=["nofile=1:-1"],
        network_mode="none",
        shm_size_bytes=7,
        cgroup_parent="/a/b/",
        no_cache_stages=["x", "y"],
        resources=ResourceLimits(
            memory_bytes=1, memory_swap_bytes=-1, cpu_shares=2, cpu_quota=3, cpu_period=4,
            cpuset_cpus="0-1", cpuset_mems="0",
        ),
    )  # fmt: skip
    check_flags(given)
    found = flag_attributes(given)
    assert found == {
        "add-hosts": "a=1.2.3.4,b=::1",
        "ulimit": "nofile=1:-1",
        "force-network-mode": "none",
        "shm-size": "7",
        "cgroup-parent": "/offload/a/b",
        "no-cache": "x,y",
        "memory": "1",
        "memswap": "-1",
        "cpushares": "2",
        "cpuquota": "3",
        "cpuperiod": "4",
        "cpusetcpus": "0-1",
        "cpusetmems": "0",
    }
    # What was just built is exported from the cache.
    assert "no-cache" not in flag_attributes(given, use_cache=False)


def test_plain_request_has_none_of_these_attributes():
    check_flags(spec(network_mode="default"))
    assert flag_attributes(spec(network_mode="default")) == {}
    assert attestation_attributes(spec()) == {}


@pytest.mark.parametrize(
    "bad",
    [
        {"extra_hosts": ["a"]},
        {"extra_hosts": ["a=b"]},
        {"extra_hosts": ["a,b=1.2.3.4"]},
        {"extra_hosts": ["a=1.2.3.4"] * 300},
        {"ulimits": ["nofile=1"]},
        {"ulimits": ["nofile=1:2,x=1:1"]},
        {"network_mode": "bridge"},
        {"shm_size_bytes": -1},
        {"cgroup_parent": "../x"},
        {"cgroup_parent": "/"},
        {"cgroup_parent": "a/../b"},
        {"no_cache_stages": ["a,b"]},
        {"no_cache_stages": ["a"], "no_cache": True},
        {"attestations": {"other": ""}},
        {"call": "lint"},
        {"call": "frontend.x y"},
        {"metadata_provenance": "all"},
        {"resources": ResourceLimits(memory_bytes=-1)},
        {"resources": ResourceLimits(cpuset_cpus="0;1")},
    ],
)
def test_what_makes_no_sense_is_refused(bad):
    with pytest.raises(UsageError):
        check_flags(spec(**bad))


def test_only_pushed_images_have_provenance_unasked():
    push, image = Output(type=Output.TYPE_REGISTRY), Output(type=Output.TYPE_IMAGE)
    default = {"attest:provenance": "mode=min,inline-only=true"}
    assert attestation_attributes(spec(outputs=[image, push])) == default
    assert attestation_attributes(spec(outputs=[image])) == {}
    off = spec(outputs=[push], attestations={"provenance": "disabled=true"})
    assert attestation_attributes(off) == {}
    asked = spec(outputs=[image], attestations={"provenance": "mode=max", "sbom": ""})
    assert attestation_attributes(asked) == {"attest:provenance": "mode=max", "attest:sbom": ""}
    assert frontend_attributes(asked, use_cache=False) == {"filename": "Dockerfile"}
    (kept,) = exporters(spec(outputs=[image]), "registry/image")
    assert kept.attributes["attestation-inline"] == "false"


def test_call_asks_the_frontend_and_attests_nothing():
    asked = spec(call="frontend.lint", attestations={"sbom": ""}, named_contexts={"a": "https://b"})
    found = frontend_attributes(asked)
    assert found["requestid"] == "frontend.lint"
    assert found["frontend.caps"].split(",") == [
        "moby.buildkit.frontend.contexts+forward", "moby.buildkit.frontend.subrequests+forward",
    ]  # fmt: skip
    assert not any(name.startswith("attest:") for name in found)


def test_provenance_is_written_in_buildx_form():
    recorded = {
        "buildDefinition": {
            "buildType": "x",
            "externalParameters": {
                "configSource": {"path": "Dockerfile"},
                "request": {"frontend": "dockerfile.v0", "args": {"target": "secret"}},
            },
            "internalParameters": {
                "builderPlatform": "linux/amd64", "buildConfig": {"llbDefinition": []}, "own": 1,
            },
            "resolvedDependencies": [{"uri": "pkg:docker/a", "digest": {"sha256": "b"}, "x": 1}],
        },
        "runDetails": {
            "builder": {"id": ""},
            "metadata": {
                "invocationId": "i", "startedOn": "s", "finishedOn": "f",
                "buildkit_completeness": {"request": True}, "buildkit_metadata": {"vcs": {}},
            },
        },
    }  # fmt: skip
    data = {"": json.dumps(recorded).encode()}

    def entry(mode: str) -> dict:
        found = metadata_entries(data, mode, lambda text: text.replace("secret", "***"))
        return json.loads(base64.b64decode(found["buildx.build.provenance"]))

    small = entry("min")
    assert small == {
        "builder": {"id": ""},
        "buildType": "https://mobyproject.org/buildkit@v1",
        "materials": [{"uri": "pkg:docker/a", "digest": {"sha256": "b"}}],
        "invocation": {
            "configSource": {"entryPoint": "Dockerfile"},
            "parameters": {"frontend": "dockerfile.v0", "args": {"target": "***"}},
            "environment": {"platform": "linux/amd64", "own": 1},
        },
    }
    large = entry("max")
    assert large["metadata"]["completeness"] == {
        "parameters": True, "environment": True, "materials": False,
    }  # fmt: skip
    assert large["metadata"]["buildInvocationID"] == "i"
    platforms = metadata_entries({"linux/arm64": data[""]}, "min", str)
    assert list(platforms) == ["buildx.build.provenance/linux/arm64"]
