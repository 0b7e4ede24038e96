"""Values of the flags for steps, annotations, attestations and calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_client.build.annotations import parse_annotations
from offload_client.build.attestations import parse_attestations
from offload_client.build.callrequest import CallRequest, parse_call
from offload_client.build.flagvalues import (
    parse_bytes,
    parse_hosts,
    parse_network,
    parse_resources,
    parse_ulimits,
)
from offload_client.build.stepoptions import Resources
from offload_core.errors import InvalidValueError, OffloadError, UsageError


def test_hosts_take_dockers_spellings() -> None:
    given = ["a:10.0.0.1", "b=::1", "c:[fe80::1]", "d:1.2.3.4,e=[5.6.7.8]", '"f=1.1.1.1,::2"', ""]
    assert parse_hosts(given) == [
        "a=10.0.0.1", "b=::1", "c=fe80::1", "d=1.2.3.4", "e=5.6.7.8", "f=1.1.1.1", "f=::2",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a", ":1.2.3.4", "a:", "a:b", "a:1.2.3", "a=b=1.2.3.4", "a:[x]"])
def test_wrong_hosts_are_named(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid host"):
        parse_hosts([text])


def test_host_gateway_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidValueError, match="give the address itself"):
        parse_hosts(["a:host-gateway"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("1.5 KiB", 1536),
        ("7b", 7),
        ("1g", 1 << 30),
        ("1T", 1 << 40),
    ],
)
def test_sizes_are_powers_of_1024(text: str, expected: int) -> None:
    assert parse_bytes("--shm-size", text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1bb", "1kbb", "1ib", "1e3", "m"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="invalid size"):
        parse_bytes("--shm-size", text)


@pytest.mark.parametrize("text", ["9" * 400, "8589934592g"])
def test_sizes_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="too large"):
        parse_bytes("--shm-size", text)


def test_ulimits_are_sorted_and_the_last_of_a_name_counts() -> None:
    given = ["nproc=5", "nofile=1:2", "nofile=3:-1", "core=-1"]
    assert parse_ulimits(given) == ["core=-1:-1", "nofile=3:-1", "nproc=5:5"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nofile", "invalid ulimit argument"),
        ("as=1", "invalid ulimit type: as"),
        ("nofile=1:2:3", "soft\\[:hard\\]"),
        ("nofile=a", "whole numbers"),
        ("nofile=", "whole numbers"),
        ("nofile=5:4", "less than or equal to hard limit"),
        ("nofile=-1:4", "less than or equal to hard limit"),
        ("nofile=9223372036854775808", "too large"),
        (f"nofile={'1' * 5000}", "whole numbers"),
    ],
)
def test_wrong_ulimits_say_why(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_ulimits([text])


def test_network_modes() -> None:
    assert [parse_network(text) for text in ("", "default", "none", "host")] == [
        "", "", "none", "host",
    ]  # fmt: skip
    with pytest.raises(InvalidValueError, match='network mode "bridge" not supported'):
        parse_network("bridge")


def test_resources_may_be_joined_or_repeated() -> None:
    given = ["memory=1g,memory-swap=-1,cpuset-cpus=0,2-3", "cpu-quota=50000", "memory=2g"]
    assert parse_resources(given) == Resources(
        memory_bytes=2 << 30, memory_swap_bytes=-1, cpu_quota=50000, cpuset_cpus="0,2-3"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("disk=1", "unknown resource"),
        ("memory", "not KEY=VALUE"),
        ("memory=0", "greater than 0"),
        ("memory=x", "invalid size"),
        ("cpu-shares=1.5", "whole number"),
        (f"cpu-shares={'1' * 5000}", "whole number"),
        (f"memory={'9' * 400}", "too large"),
        ("cpuset-cpus=a", "0-3"),
    ],
)
def test_wrong_resources(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_resources([text])


def test_annotations_become_exporter_attributes() -> None:
    given = [
        "plain=1", "with.colon=a:b", "index:i=2", "index,manifest[linux/arm64/v8]:both=3",
        "manifest-descriptor:d=", "index-descriptor[linux/amd64]:e=x=y",
    ]  # fmt: skip
    assert parse_annotations(given) == {
        "annotation.plain": "1",
        "annotation.with.colon": "a:b",
        "annotation-index.i": "2",
        "annotation-index.both": "3",
        "annotation-manifest[linux/arm64].both": "3",
        "annotation-manifest-descriptor.d": "",
        "annotation-index-descriptor.e": "x=y",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("novalue", "expected key=value"),
        ("Layer:a=b", "invalid annotation type"),
        ("layer:a=b", 'unknown annotation type "layer"'),
        ("manifest[/]:a=b", "invalid platform"),
    ],
)
def test_wrong_annotations(text: str, problem: str) -> None:
    with pytest.raises(InvalidValueError, match=problem):
        parse_annotations([text])


@pytest.mark.parametrize(
    ("attests", "provenance", "sbom", "expected"),
    [
        ([], "", "", {}),
        ([], "true", "1", {"provenance": "", "sbom": ""}),
        ([], "false", "", {"provenance": "disabled=true"}),
        ([], "mode=max", "generator=a/b", {"provenance": "mode=max", "sbom": "generator=a/b"}),
        (["type=sbom,b=2,a=1"], "", "", {"sbom": "a=1,b=2"}),
        (["type=provenance,mode=max"], "false", "", {"provenance": "mode=max"}),
        (["type=provenance,disabled=false"], "", "", {"provenance": ""}),
        (['type=sbom,"a=1,2"'], "", "", {"sbom": '"a=1,2"'}),
    ],
)
def test_attestations(
    attests: list[str], provenance: str, sbom: str, expected: dict[str, str]
) -> None:
    assert parse_attestations(attests, provenance, sbom, {}) == expected


def test_default_attestations_can_be_turned_off_by_the_environment() -> None:
    off = {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    assert parse_attestations([], "", "", off) == {"provenance": "disabled=true"}
    assert parse_attestations([], "mode=max", "", off) == {"provenance": "mode=max"}
    assert parse_attestations([], "", "", {"BUILDX_NO_DEFAULT_ATTESTATIONS": "0"}) == {}
    with pytest.raises(InvalidValueError, match="not true or false"):
        parse_attestations([], "", "", {"BUILDX_NO_DEFAULT_ATTESTATIONS": "maybe"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mode=max", "type not specified"),
        ("type=x", "unknown attestation type"),
        ("type=sbom,oops", "invalid value oops"),
        ("type=sbom,disabled=maybe", "invalid value"),
    ],
)
def test_wrong_attestations(text: str, problem: str) -> None:
    with pytest.raises(InvalidValueError, match=problem):
        parse_attestations([text], "", "", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("build", None),
        ("", None),
        ("check", CallRequest("lint")),
        ("lint,format=json", CallRequest("lint", "json")),
        ("format=text,outline", CallRequest("outline")),
        ("check,ignorestatus=true", CallRequest("lint", ignore_status=True)),
        ("subrequests.describe", CallRequest("subrequests.describe")),
    ],
)
def test_calls(text: str, expected: CallRequest | None) -> None:
    assert parse_call(text) == expected


@pytest.mark.parametrize("text", ["a,b", "a,x=y", "a,ignorestatus=maybe", "a,format=xml"])
def test_wrong_calls(text: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_call(text)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_sentence(text: str) -> None:
    for parse in (
        parse_call,
        parse_network,
        lambda value: parse_hosts([value]),
        lambda value: parse_ulimits([value]),
        lambda value: parse_resources([value]),
        lambda value: parse_annotations([value]),
        lambda value: parse_attestations([value], "", "", {}),
        lambda value: parse_bytes("--shm-size", value),
    ):
        try:
            parse(text)
        except OffloadError as error:
            assert error.message
