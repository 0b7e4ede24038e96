"""The report of the network at the end of a build."""

from __future__ import annotations

from offload_client.build.networkreport import report_json, report_text
from offload_proto.v1.egress_service_pb2 import LearnPolicyResponse, NetworkUse
from offload_proto.v1.events_pb2 import EgressUse

EVIL = EgressUse(host="evil.example\x1b[2J", protocol="any", count=2, rule_id="default-deny")
V6 = EgressUse(address="2001:db8::1", port=443, protocol="tcp", count=1, allowed=True)
IMAGE = EgressUse(url="docker.io/library/alpine:3", protocol="tcp", count=1, allowed=True)


def reply(*uses: EgressUse, more: bool = False) -> LearnPolicyResponse:
    found = [NetworkUse(build_id="b1", step="[1/1] RUN x", use=use) for use in uses]
    return LearnPolicyResponse(text='posture = "allowlist"\n', uses=found, more=more)


def test_people_see_what_was_refused_first_and_the_proposal_last():
    text = report_text(reply(EVIL, V6, IMAGE, more=True))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[1:3] == ["Refused in the network:", "TARGET PROTOCOL TIMES RULE STEP"]
    assert rows[3].endswith("any 2 default-deny [1/1] RUN x")
    assert "[2001:db8::1]:443 tcp 1 - [1/1] RUN x" in rows
    assert "docker.io/library/alpine:3 tcp 1 - [1/1] RUN x" in rows
    assert rows[-1] == 'posture = "allowlist"'
    assert any(row.startswith("There is more") for row in rows)
    assert "\x1b" not in text


def test_nothing_reached_is_one_sentence():
    assert "\n" not in report_text(reply())


def test_programs_get_both_lists_and_the_proposal():
    found = report_json(reply(EVIL, V6))
    assert [item["rule"] for item in found["refused"]] == ["default-deny"]
    (reached,) = found["reached"]
    assert (reached["build"], reached["address"], reached["port"]) == ("b1", "2001:db8::1", 443)
    assert (found["proposal"], found["more"]) == ('posture = "allowlist"\n', False)
