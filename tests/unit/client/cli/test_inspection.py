from __future__ import annotations

from offload_client.cli.inspection import StepList, as_json, as_text
from offload_proto.v1.builds_service_pb2 import Build
from offload_proto.v1.events_pb2 import EgressUse, ProgressBatch


def steps_of(*uses: EgressUse) -> StepList:
    found = StepList()
    first = ProgressBatch()
    first.vertices.add(digest="v1", name="[2/2] RUN curl")
    found.take(first)
    found.take(ProgressBatch(egress=uses))
    return found


REFUSED = {"vertex": "v1", "host": "evil.example", "port": 443, "protocol": "tcp", "rule_id": "r"}


def test_what_was_refused_is_shown_with_its_step_and_the_last_count():
    first, last = EgressUse(**REFUSED, count=1), EgressUse(**REFUSED, count=7)
    steps = steps_of(first, last)
    text = as_text(Build(build_id="b1"), steps)
    assert "Refused in the network:" in text
    (row,) = [line for line in text.splitlines() if "evil.example:443" in line]
    assert row.split() == ["evil.example:443", "7", "r", "[2/2]", "RUN", "curl"]
    (record,) = as_json(Build(), steps)["network"]["refused"]
    assert (record["step"], record["count"], record["url"]) == ("[2/2] RUN curl", 7, None)


def test_what_was_reached_is_for_machines_only():
    use = EgressUse(allowed=True, host="pypi.org", address="151.101.0.223", port=443)
    steps = steps_of(use)
    assert "pypi.org" not in as_text(Build(), steps)
    (record,) = as_json(Build(), steps)["network"]["reached"]
    assert (record["host"], record["step"], record["first_at"]) == ("pypi.org", None, None)


def test_builds_without_a_firewall_show_nothing_of_it():
    assert "network" not in as_text(Build(build_id="b1"), steps_of()).lower()


def test_names_of_steps_move_no_cursor_and_make_no_rows():
    steps = StepList()
    batch = ProgressBatch(egress=[EgressUse(**REFUSED, count=1)])
    batch.vertices.add(digest="v1", name="RUN x\x1b[2J\rdone\n[3/3] RUN forged", error="failed")
    batch.logs.add(vertex="v1", data=b"out\x1b[2Jput\n")
    steps.take(batch)
    text = as_text(Build(build_id="b1", name="n\x1b]0;t\x07", error="one\ntwo\x1b[1A"), steps)
    assert "\x1b" not in text and "\r" not in text
    assert not [line for line in text.splitlines() if line.startswith("[3/3]")]
    assert "one\ntwo" in text and "  output" in text
