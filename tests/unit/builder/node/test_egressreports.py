"""Reports of builds: which step it was, what people read, what is kept."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from offload_builder.egress.policy.model import BUILT_IN, Layer, Policy, Protocol, Verdict
from offload_builder.node.egressdesk import EgressDesk
from offload_builder.node.egressreport import MAX_LINES_OF_STEP, NETWORK_STEP, BuildEgress
from offload_builder.node.egresstold import Told
from offload_builder.node.mounts.gate import Step
from offload_proto.v1.events_pb2 import ProgressBatch

POLICY = Policy(name="eu-1", contact="#infra")


def told(source: str, host: str = "evil.example", port: int | None = 443, **verdict) -> Told:
    values = {
        "allowed": False,
        "rule_id": "default-deny",
        "rule_text": 'posture "allowlist"',
        "place": BUILT_IN,
        "reason": "no rule allows it",
    } | verdict
    return Told(
        time.time(),
        "shop",
        source,
        True,
        host,
        "203.0.113.9",
        port,
        Protocol.TCP,
        Verdict(**values),
    )


class Build:
    """A build with a progress of its own."""

    def __init__(self, build_id: str = "b1") -> None:
        self.said: list[ProgressBatch] = []
        self.egress = BuildEgress(build_id, self.said.append)

    def begin(self, digest: str, name: str, *, ended: bool = False, error: str = "") -> None:
        batch = ProgressBatch()
        vertex = batch.vertices.add(digest=digest, name=name, error=error)
        vertex.started_at.GetCurrentTime()
        if ended:
            vertex.completed_at.GetCurrentTime()
        self.egress.see(batch)

    @property
    def lines(self) -> list[tuple[str, str]]:
        return [(log.vertex, log.data.decode()) for batch in self.said for log in batch.logs]

    @property
    def uses(self) -> list:
        return [use for batch in self.said for use in batch.egress]


@pytest.fixture
def leases(tmp_path):
    folder = tmp_path / "leases"
    folder.mkdir()
    return folder


@pytest.fixture
async def desk(leases):
    async with EgressDesk(lambda: POLICY) as one:
        one.sources.leases = lambda: leases
        yield one


async def run(desk, leases, tmp_path, address: str, command: str) -> Step:
    (leases / address).write_text(f"space-{address}\r\neth0")
    folder = tmp_path / f"bundle-{address}"
    folder.mkdir()
    spaces = [{"type": "network", "path": f"/net/cni/space-{address}"}]
    config = {"process": {"args": ["sh", "-c", command]}, "linux": {"namespaces": spaces}}
    (folder / "config.json").write_text(json.dumps(config))
    step = Step(1, folder)
    await desk.sources.begin(step)
    return step


async def test_a_refusal_is_a_line_of_its_step_with_rule_and_whom_to_ask(desk, leases, tmp_path):
    build = Build()
    build.begin("v5", "[5/9] RUN curl evil.example")
    await run(desk, leases, tmp_path, "10.0.0.5", "curl evil.example")
    with desk.reporting(build.egress):
        desk.hear(told("10.0.0.5"))
        await desk.settled()
    ((vertex, line),) = build.lines
    assert vertex == "v5"
    assert line == (
        "egress: RUN step 5/9 was refused evil.example:443 (rule default-deny, pool eu-1); "
        "ask #infra or see offload policy explain\n"
    )
    (use,) = build.uses
    assert (use.vertex, use.allowed, use.host, use.port, use.count) == (
        "v5", False, "evil.example", 443, 1,
    )  # fmt: skip
    assert build.egress.sentences("v5") == [build.lines[0][1].strip()]


async def test_parallel_steps_of_several_builds_are_told_apart(desk, leases, tmp_path):
    one, two = Build("b1"), Build("b2")
    one.begin("v1", "[a 2/2] RUN curl one.example")
    one.begin("v2", "[b 2/2] RUN wget two.example")
    two.begin("v3", "[2/2] RUN fetch three.example")
    for address, command in (
        ("10.0.0.1", "curl one.example"),
        ("10.0.0.2", "wget two.example"),
        ("10.0.0.3", "fetch three.example"),
    ):
        await run(desk, leases, tmp_path, address, command)
    with desk.reporting(one.egress), desk.reporting(two.egress):
        for number in (3, 1, 2):
            desk.hear(told(f"10.0.0.{number}", f"host{number}.example"))
        await desk.settled()
    assert [(use.vertex, use.host) for use in one.uses] == [
        ("v1", "host1.example"), ("v2", "host2.example"),
    ]  # fmt: skip
    assert [(use.vertex, use.host) for use in two.uses] == [("v3", "host3.example")]


async def test_builds_that_share_a_step_both_hear_of_it(desk, leases, tmp_path):
    one, two = Build("b1"), Build("b2")
    for build in (one, two):
        build.begin("v1", "[2/2] RUN curl one.example")
    await run(desk, leases, tmp_path, "10.0.0.1", "curl one.example")
    with desk.reporting(one.egress), desk.reporting(two.egress):
        desk.hear(told("10.0.0.1"))
        await desk.settled()
    assert [vertex for vertex, _ in one.lines + two.lines] == ["v1", "v1"]


async def test_a_step_that_buildkit_tells_of_late_is_waited_for(desk, leases, tmp_path):
    build = Build()
    build.begin("v1", "[a 2/2] RUN something else altogether")
    await run(desk, leases, tmp_path, "10.0.0.1", "curl one.example")
    with desk.reporting(build.egress):
        desk.hear(told("10.0.0.1"))
        await asyncio.sleep(0.1)
        assert not build.said
        batch = ProgressBatch()
        vertex = batch.vertices.add(digest="v2", name="[b 2/2] RUN curl one.example")
        vertex.started_at.FromSeconds(int(time.time()) - 1)
        build.egress.see(batch)
        await desk.settled()
    assert [vertex for vertex, _ in build.lines] == ["v2"]


async def test_what_buildkit_fetches_itself_is_told_at_the_step_that_runs(desk, leases, tmp_path):
    build = Build()
    build.begin("v0", "[internal] load build context")
    build.begin("v1", "[2/3] ADD http://evil.example/x /")
    build.begin("v2", "[3/3] RUN make")
    await run(desk, leases, tmp_path, "10.0.0.1", "make")
    with desk.reporting(build.egress):
        desk.hear(told("10.77.0.2"))
        await desk.settled()
    ((vertex, line),) = build.lines
    assert vertex == "v1"
    assert line.startswith("egress: ADD step 2/3 was refused evil.example:443")


async def test_what_no_step_is_known_of_is_told_all_the_same(desk):
    build = Build()
    with desk.reporting(build.egress):
        desk.hear(told("10.77.0.2"))
        await asyncio.sleep(1.3)
    ((vertex, line),) = build.lines
    assert vertex == NETWORK_STEP
    assert line.startswith("egress: the build was refused")


async def test_a_flood_is_few_lines_and_all_of_it_counts():
    build = Build()
    build.begin("v1", "[2/2] RUN scan")
    for port in range(1, 60):
        for _ in range(3):
            build.egress.take(told("10.0.0.1", port=port), ["v1"], POLICY)
    assert len(build.lines) == MAX_LINES_OF_STEP + 1
    assert "offload inspect b1" in build.lines[-1][1]
    build.egress.finish(None)
    last = {use.port: use.count for use in build.uses}
    assert last == dict.fromkeys(range(1, 60), 3)


async def test_what_was_reached_is_kept_without_a_line():
    build = Build()
    build.begin("v1", "[2/2] RUN curl")
    build.egress.take(told("10.0.0.1", allowed=True, rule_id="web"), ["v1"], POLICY)
    assert build.lines == []
    assert [(use.allowed, use.rule_id) for use in build.uses] == [(True, "web")]


async def test_a_line_begins_where_the_step_has_not_ended_its_own():
    build = Build()
    batch = ProgressBatch()
    batch.logs.add(vertex="v1", data=b"downloading ...")
    build.egress.see(batch)
    for port in (1, 2):
        build.egress.take(told("10.0.0.1", port=port), ["v1"], POLICY)
    assert [line.index("egress") for _, line in build.lines] == [1, 0]


async def test_the_word_of_a_project_is_called_so():
    build = Build()
    build.egress.take(told("10.0.0.1", layer=Layer.PROJECT), [], POLICY)
    assert "(rule default-deny, project shop)" in build.lines[0][1]


@pytest.mark.parametrize("name", ["custom\nforged\x1b[2J", "[a\nforged\x1b[2J 1/2] RUN x"])
def test_name_of_a_step_makes_no_line_of_its_own(name):
    build = Build()
    build.begin("s1", name)
    build.egress.take(told("100.64.0.9"), ["s1"], POLICY)
    ((_, line),) = build.lines
    assert line.count("\n") == 1 and line.endswith("\n") and "\x1b" not in line
