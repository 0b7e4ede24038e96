"""Which build contexts a node accepts, and what BuildKit is told of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.contextplan import layout_stores
from offload_builder.node.solveplan import cache_entry_key, check_spec, frontend_attributes
from offload_core.contextnames import layout_source_name, local_source_name
from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import BuildSpec

DIGEST = "sha256:" + "0a" * 32


def spec(**values) -> BuildSpec:
    return BuildSpec(**{"dockerfile_path": "Dockerfile"} | values)


@pytest.mark.parametrize(
    "url",
    ["https://host/r.git#ref:a dir", "http://host/c.tar", "git://host/r", "github.com/a/b",
     "ssh://git@host/r.git", "git@host:r.git"],
)  # fmt: skip
def test_url_is_the_context(url):
    wanted = spec(context_url=url, dockerfile_path="a/b/Dockerfile.dev")
    check_spec(wanted)
    assert frontend_attributes(wanted) == {"filename": "a/b/Dockerfile.dev", "context": url}


def test_dockerfile_of_the_client_for_a_context_from_elsewhere():
    key = {"dockerfilekey": "dockerfile"}
    wanted = spec(context_url="https://host/r.git", frontend_attributes=key)
    check_spec(wanted)
    assert frontend_attributes(wanted)["dockerfilekey"] == "dockerfile"
    with pytest.raises(UsageError, match="bad Dockerfile name"):
        check_spec(spec(context_url="https://h/r.git", dockerfile_path="a/b",
                        frontend_attributes=key))  # fmt: skip


def test_named_contexts():
    wanted = spec(
        named_contexts={
            "dir": "local:dir",
            "context": "local:_context",
            "oci:x": "local:_oci:x",
            "ghcr.io/a/b:1": "docker-image://alpine@" + DIGEST,
            "repo": "https://host/r.git#v1",
            "base:3": f"oci-layout://base:3@{DIGEST}",
        }
    )
    check_spec(wanted)
    attributes = frontend_attributes(wanted)
    assert attributes["context:dir"] == "local:dir"
    assert attributes["context:context"] == "local:_context"
    assert attributes["context:ghcr.io/a/b:1"] == "docker-image://alpine@" + DIGEST
    assert attributes["context:repo"] == "https://host/r.git#v1"
    ((store, name),) = layout_stores(wanted).items()
    assert name == "oci:base:3"
    assert attributes["context:base:3"] == f"oci-layout://{store}@{DIGEST}"
    # BuildKit reads it as the name of an image without tag.
    assert store.isalnum()
    assert attributes["frontend.caps"] == "moby.buildkit.frontend.contexts+forward"


@pytest.mark.parametrize(
    "bad",
    [
        {"context_url": "file:///etc"},
        {"context_url": "https://host/\nx"},
        {"context_url": "https://" + "x" * 10_000},
        {"context_url": "input:x"},
        {"context_url": "https://h/r.git", "dockerfile_path": "../D"},
        {"context_url": "https://h/r.git", "dockerfile_path": "/D"},
        {"context_url": "https://h/r.git", "dockerfile_path": ""},
        {"dockerfile_path": "a/b"},
        {"frontend_attributes": {"dockerfilekey": "other"}},
        {"frontend_attributes": {"local-sessionid:context": "x"}},
        {"named_contexts": {"a": "local:b"}},
        {"named_contexts": {"dockerfile": "local:dockerfile"}},
        {"named_contexts": {"a": "input:a"}},
        {"named_contexts": {"a": "target:a"}},
        {"named_contexts": {"a": ""}},
        {"named_contexts": {"a": f"oci-layout://b@{DIGEST}"}},
        {"named_contexts": {"a": "oci-layout://a"}},
        {"named_contexts": {"a": "oci-layout://a@sha256:../../x"}},
        {"named_contexts": {"": "local:"}},
        {"named_contexts": {"a b": "local:a b"}},
        {"named_contexts": {"a" * 600: "local:" + "a" * 600}},
    ],
)
def test_other_contexts_are_refused(bad):
    with pytest.raises(UsageError) as caught:
        check_spec(spec(**bad))
    assert "\n" not in caught.value.message


@given(st.text(max_size=30), st.text(max_size=30))
def test_attributes_of_a_checked_request_say_nothing_else(name, value):
    wanted = spec(named_contexts={name: value})
    try:
        check_spec(wanted)
    except UsageError:
        return
    assert set(frontend_attributes(wanted)) == {"filename", f"context:{name}", "frontend.caps"}


@given(st.from_regex(r"[a-z0-9][a-z0-9:/._-]{0,12}", fullmatch=True))
def test_names_of_local_sources_never_meet(name):
    names = {"context", "dockerfile", layout_source_name(name), local_source_name(name)}
    assert len(names) == 4


def test_definition_tells_builds_of_one_url_apart():
    keys = {
        cache_entry_key(spec(definition=definition), "linux/amd64")
        for definition in ("https://h/r.git\0/\0Dockerfile", "https://h/r.git\0/d\0Dockerfile")
    }
    assert len(keys) == 2
