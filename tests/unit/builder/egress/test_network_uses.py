"""What a gateway reads out of the record of a build, and what becomes of it in a proposal."""

from __future__ import annotations

import pytest

from offload_builder.egress.policy.learn import learn
from offload_builder.egress.urls.locations import OddSourceError, location_shown
from offload_builder.gateway.networkuses import NetworkUses, attempt_of, attempts
from offload_proto.v1.events_pb2 import EgressUse, ProgressBatch, Vertex, VertexStatus
from tests.unit.builder.egress.policy.texts import attempt, judged, read


def use(host: str = "", port: int = 0, *, allowed: bool = True, **more: object) -> EgressUse:
    fields: dict[str, object] = {"vertex": "v", "protocol": "tcp", "rule_id": "default-deny"}
    return EgressUse(host=host, port=port, allowed=allowed, **(fields | more))


def gathered(*batches: ProgressBatch) -> NetworkUses:
    found = NetworkUses("b1")
    for batch in batches:
        found.take(batch)
    return found


@pytest.mark.parametrize(
    ("url", "kind", "host", "port"),
    [
        ("https://a.example/x", "http", "a.example", 443),
        ("http://a.example:8080/x", "http", "a.example", 8080),
        ("ssh://git.example/x.git", "http", "git.example", 22),
        ("git.example:team/x.git", "git", "git.example", 22),
        ("docker.io/library/alpine:3", "image", "registry-1.docker.io", 443),
        ("registry.example:5000/a/b:1", "image", "registry.example", 5000),
        ("registry.example/a@sha256:" + "0" * 64, "image", "registry.example", 443),
    ],
)
def test_a_url_of_the_record_leads_back_to_its_place(url, kind, host, port):
    found = location_shown(url)
    assert (found.kind, found.host, found.port) == (kind, host, port)


def test_a_url_that_leads_nowhere_is_refused():
    with pytest.raises(OddSourceError):
        location_shown("gopher://a.example/")


def test_the_last_word_of_a_use_counts_and_refusals_come_first():
    found = gathered(
        ProgressBatch(
            vertices=[Vertex(digest="v", name="[1/2] RUN x")], egress=[use("a.example", 443)]
        ),
        ProgressBatch(egress=[use("a.example", 443, count=7), use("b.example", allowed=False)]),
    ).all()
    assert [(item.use.host, item.use.count, item.step) for item in found] == [
        ("b.example", 0, "[1/2] RUN x"),
        ("a.example", 7, "[1/2] RUN x"),
    ]


def test_registries_that_the_node_asks_are_reached_too_but_once():
    found = gathered(
        ProgressBatch(
            vertices=[
                Vertex(digest="m", name="[internal] load metadata for docker.io/library/alpine:3"),
                Vertex(digest="n", name="[internal] load metadata for known.example/a:1"),
            ],
            statuses=[
                VertexStatus(id="pushing manifest for r.example/app:1@sha256:ab", vertex="p")
            ],
            egress=[use("known.example", 443)],
        )
    ).all()
    assert [item.use.url for item in found if item.use.url] == [
        "docker.io/library/alpine:3",
        "r.example/app:1",
    ]
    reached, refused = attempts(item.use for item in found)
    assert refused == []
    text = learn(reached)
    assert 'presets = ["docker-hub"]' in text
    assert 'allow = ["known.example", "r.example"]' in text


def test_only_what_the_posture_refused_is_proposed():
    uses = [
        use("a.example", 443, allowed=False, rule_id="no-a"),
        use("b.example", 0, allowed=False, protocol="any"),
        use("no..name", 0, allowed=False),
        use("", 0, allowed=False, address="nonsense"),
    ]
    _, refused = attempts(uses)
    assert [str(item) for item in refused] == ["b.example (any)"]
    assert attempt_of(use("", 80, address="203.0.113.7")) == attempt(None, "203.0.113.7", 80)


def test_refused_places_are_comments_unless_they_are_wished():
    reached = [attempt("a.example", "203.0.113.5", 443)]
    refused = [
        attempt("b.example", None, 8443),
        attempt(None, "203.0.113.66", 22),
        attempt("a.example", None, 443),
        attempt(None, "10.0.0.1", 443),
    ]
    policy = read(learn(reached, refused))
    assert not judged(policy, "b.example", "203.0.113.6", 8443).allowed
    assert '# allow = ["b.example"]' in learn(reached, refused)
    live = learn(reached, refused, with_refused=True)
    policy = read(live)
    assert judged(policy, "b.example", "203.0.113.6", 8443).allowed
    assert judged(policy, None, "203.0.113.66", 22).allowed
    assert not judged(policy, None, "10.0.0.1", 443).allowed
    assert live.count("a.example") == 1
    # Without the signs of comments the other form says the same.
    head, _, tail = learn(reached, refused).partition("# [[rule]]")
    commented = [line for line in tail.splitlines() if not line.startswith("# Not learned")]
    kept = [line[2:] for line in commented if line.startswith("# ") and "10.0.0.1" not in line]
    again = read("\n".join([head, "[[rule]]", *kept]))
    assert [rule.targets for rule in again.rules] == [rule.targets for rule in policy.rules]
