from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from offload_builder.buildkit.failure import failure_from_status
from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.policyservice import refusal_of
from offload_builder.buildkit.providers import SourceUse
from offload_builder.egress.policy.model import EffectivePolicy, Policy, Posture
from offload_builder.egress.resolver.contract import ServiceName
from offload_builder.egress.urls.buildurls import BuildUrls
from offload_builder.egress.urls.locations import location_of
from offload_builder.egress.urls.urlpolicy import OwnPlace, UrlPolicy
from offload_builder.egress.urls.urlrecord import MAX_REFUSALS, MAX_USES, UrlRecord
from offload_proto.buildkit.policysession_pb2 import CheckPolicyRequest, CheckPolicyResponse
from offload_proto.v1.events_pb2 import ProgressBatch
from tests.fixtures.nameserver import allowing

ALLOWED = UrlPolicy(allowing("a.test")).verdict(location_of("https://a.test/", {}))


@dataclass
class Person:
    notices: list[str] = field(default_factory=list)

    async def notice(self, text: str, *, level: str = "warning") -> None:
        self.notices.append(text)


def allows(policy: UrlPolicy, identifier: str) -> bool:
    return policy.verdict(location_of(identifier, {})).allowed


def batch(step: str, name: str = "", output: bytes = b"", *, ended: bool = False) -> ProgressBatch:
    found = ProgressBatch()
    if name:
        vertex = found.vertices.add(digest=step, name=name)
        vertex.started_at.GetCurrentTime()
        if ended:
            vertex.completed_at.GetCurrentTime()
    if output:
        found.logs.add(vertex=step, stream=2, data=output)
    return found


def test_host_and_port_decide() -> None:
    policy = UrlPolicy(allowing("a.test", "*.b.test", ports=(443, 8443)))
    assert allows(policy, "https://a.test/x")
    assert allows(policy, "https://c.b.test:8443/x")
    assert not allows(policy, "http://a.test/x")
    assert not allows(policy, "https://a.test:444/x")
    assert not allows(policy, "https://b.test/x")
    assert not allows(policy, "docker-image://docker.io/library/alpine")


def test_addresses_in_protected_ranges_are_refused_under_an_open_posture() -> None:
    policy = UrlPolicy(EffectivePolicy(Policy(Posture.OPEN)))
    assert allows(policy, "https://any.test/x")
    for host in ("169.254.169.254", "10.0.0.1", "[::1]", "[::ffff:10.0.0.1]"):
        assert not allows(policy, f"http://{host}/latest")


def test_configured_registries_and_the_nodes_own_are_allowed() -> None:
    policy = UrlPolicy(allowing(), [ServiceName("r.test", (5000,))], [OwnPlace("127.0.0.1", 4444)])
    assert allows(policy, "docker-image://r.test:5000/a")
    assert allows(policy, "docker-image://127.0.0.1:4444/a")
    assert not allows(policy, "docker-image://127.0.0.1:4445/a")
    assert not allows(policy, "http://127.0.0.1:4444/v2/")


async def test_a_refusal_says_address_rule_and_whom_to_ask() -> None:
    base = allowing("a.test").base
    policy = UrlPolicy(EffectivePolicy(Policy(base.posture, base.rules, contact="#infra")))
    person = Person()
    urls = BuildUrls("b1", lambda: policy, person)
    reason = urls.check(SourceUse("https://u:secret@evil.test/x?key=secret", {}))
    assert "https://evil.test/x was refused" in reason
    assert "rule default-deny" in reason
    assert "#infra" in reason
    assert "secret" not in reason
    assert "unknown-source" in urls.check(SourceUse("magic://x", {}))
    assert urls.check(SourceUse("mag\nic\x1b[2J://x", {})).isprintable()
    await urls.close()
    assert not person.notices


async def test_refusals_of_steps_are_told_once_and_within_a_bound() -> None:
    person = Person()
    urls = BuildUrls("b1", lambda: UrlPolicy(allowing(), proxied=True), person)
    urls.see(batch("s1", "[2/3] RUN make"))
    for number in range(40):
        for _ in range(2):
            urls.check(SourceUse(f"https://n{number}.test:443/", {}))
    await asyncio.sleep(0)
    await urls.close()
    assert len(person.notices) == 20
    assert person.notices[0].startswith("[2/3] RUN make: egress: https://n0.test/ was refused")
    assert {item.count for item in urls.record.refusals} == {2}


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_requests_are_listed_by_step_however_the_output_comes(size: int) -> None:
    record = UrlRecord()
    record.allowed(location_of("https://a.test:443/one", {}), ALLOWED)
    record.see(batch("s1", "[2/3] RUN make"))
    output = (
        b"text\nproxy network requests:\n- GET https://a.test/one?x -> 200\n"
        b"- GET https://a.test/one -> 200\n- POST https://a.test/one -> 404\n"
        b"- GET https://never-asked.test/ -> 200\n- GET\n"
    )
    for start in range(0, len(output), size):
        record.see(batch("s1", output=output[start : start + size]))
    found = {(use.step, use.method, use.status): use.count for use in record.uses}
    assert found == {("[2/3] RUN make", "GET", 200): 2, ("[2/3] RUN make", "POST", 404): 1}


def test_a_record_has_bounds() -> None:
    record = UrlRecord()
    refused = UrlPolicy(allowing()).verdict(location_of("https://a.test/", {}))
    for number in range(MAX_USES + 5):
        place = location_of(f"https://a.test/{number}", {})
        record.allowed(place, ALLOWED)
        record.refused(place, refused, "no")
    assert len(record.uses) == MAX_USES
    assert len(record.refusals) == MAX_REFUSALS
    assert record.left_out == 5 + MAX_USES + 5 - MAX_REFUSALS


def test_buildkit_is_answered_with_the_reason() -> None:
    urls = BuildUrls("b1", lambda: UrlPolicy(allowing("a.test")), Person())
    request = CheckPolicyRequest()
    request.Source.Source.identifier = "https://a.test/x"
    assert refusal_of(urls, request.SerializeToString()) == b""
    request.Source.Source.identifier = "https://evil.test/x"
    answer = CheckPolicyResponse.FromString(refusal_of(urls, request.SerializeToString()))
    assert "evil.test" in answer.decision.denyMessages[0].message


def test_a_failure_shows_the_reasons_of_the_policy() -> None:
    from google.rpc.status_pb2 import Status

    status = Status(message="failed: not allowed by policy: action DENY")
    detail = status.details.add(type_url="x/policysession.DecisionResponse+json")
    detail.value = b'{"action":1,"denyMessages":[{"message":"egress: no"}]}'
    failure = failure_from_status(GrpcError(2, "failed", status.SerializeToString()))
    assert failure.refusals == ("egress: no",)
    assert failure.to_message().message.endswith("\negress: no")


def test_a_failure_has_nothing_secret_of_a_refused_address() -> None:
    words = (
        'failed to load LLB: source "https://joe:secret@evil.test/@x/a?t=\\"secret#secret" not '
        'allowed by policy: action DENY; source "git://evil.test/a#v1" not allowed by policy'
    )
    failure = failure_from_status(GrpcError(2, words))
    assert failure.message == (
        'failed to load LLB: source "https://evil.test/@x/a" not allowed by policy: action DENY; '
        'source "git://evil.test/a" not allowed by policy'
    )
