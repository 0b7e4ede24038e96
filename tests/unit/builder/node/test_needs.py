"""What a build needs its client for."""

from __future__ import annotations

import pytest

from offload_builder.node.needs import (
    CONTEXT,
    ClientNeeds,
    ContextWatch,
    has_local_sources,
    lasting_needs,
)
from offload_proto.v1.build_spec_pb2 import BuildSpec, CacheOption, Output
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex


def vertex(name: str, *, begun: bool = False, ended: bool = False) -> ProgressBatch:
    found = Vertex(digest=f"sha256:{name}", name=name)
    if begun:
        found.started_at.GetCurrentTime()
    if ended:
        found.completed_at.GetCurrentTime()
    return ProgressBatch(vertices=[found])


def test_needs_are_told_when_their_words_change():
    needs, told = ClientNeeds(), []
    needs.on_change = lambda: told.append(needs.words)
    needs.begin("a")
    with needs.hold("a"), needs.hold("b"):
        assert needs.words == "a and b"
    assert not needs.independent
    needs.end("a")
    assert needs.message().independent
    needs.begin("a")
    needs.clear()
    needs.end("a")
    assert needs.independent
    assert told == ["a", "a and b", "a", "", "a", ""]


def test_context_is_needed_until_a_step_runs_and_all_sources_are_read():
    needs = ClientNeeds()
    watch = ContextWatch(needs, BuildSpec())
    for name in ("[internal] load build definition", "docker-image://docker/dockerfile:1"):
        watch.take(vertex(name, begun=True, ended=True))
    watch.take(vertex("[internal] load build context"))
    watch.take(vertex("[2/3] COPY a b"))
    assert needs.words == CONTEXT
    watch.take(vertex("[1/3] RUN true", begun=True))
    assert needs.words == CONTEXT
    watch.take(vertex("[internal] load build context", begun=True, ended=True))
    assert needs.independent


@pytest.mark.parametrize(
    "name", ["[1/2] RUN true", "[linux/amd64 base 1/12] FROM x", "[build 2/4] COPY a b"]
)
def test_a_dockerfile_that_reads_no_context_needs_its_client_until_its_first_step(name):
    needs = ClientNeeds()
    watch = ContextWatch(needs, BuildSpec())
    watch.take(vertex("[context other] load from client"))
    watch.take(vertex(name, begun=True))
    assert not needs.independent
    watch.take(vertex("[context other] load from client", begun=True, ended=True))
    assert needs.independent


def test_remote_context_needs_nobody():
    spec = BuildSpec(context_url="https://example.org/a.git")
    assert not has_local_sources(spec)
    needs = ClientNeeds()
    ContextWatch(needs, spec)
    assert needs.independent
    spec.named_contexts["x"] = "local:context:x"
    assert has_local_sources(spec)


def test_outputs_agents_and_caches_at_the_client_need_it_to_the_end():
    spec = BuildSpec(
        outputs=[Output(type=Output.TYPE_TAR), Output(type=Output.TYPE_IMAGE)],
        cache_exports=[CacheOption(type="local"), CacheOption(type="registry")],
        ssh_ids=["default"],
    )
    assert lasting_needs(spec) == [
        "the output of type tar",
        "the exported cache",
        "the SSH agent",
    ]
