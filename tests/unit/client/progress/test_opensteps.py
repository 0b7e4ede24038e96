from __future__ import annotations

from offload_client.progress.clock import nanoseconds
from offload_client.progress.model import BuildView
from offload_client.progress.opensteps import OpenSteps
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex, VertexLog, VertexStatus


def vertex(digest: str, started: int | None = None, completed: int | None = None) -> Vertex:
    message = Vertex(digest=digest, name=f"step {digest}")
    if started is not None:
        message.started_at.seconds = started
    if completed is not None:
        message.completed_at.seconds = completed
    return message


def test_running_steps_are_ended_at_the_last_time_of_the_node() -> None:
    steps = OpenSteps()
    steps.take(ProgressBatch(vertices=[vertex("a", 10), vertex("b", 11), vertex("c")]))
    steps.take(ProgressBatch(vertices=[vertex("a", 10, 14)]))
    status = VertexStatus(id="x", vertex="b")
    status.timestamp.seconds = 16
    log = VertexLog(vertex="b", data=b"x")
    log.timestamp.seconds = 17
    steps.take(ProgressBatch(statuses=[status], logs=[log]))
    (ended,) = steps.canceled().vertices
    assert (ended.digest, ended.name, ended.error) == ("b", "step b", "context canceled")
    assert nanoseconds(ended.completed_at) == 17 * 10**9
    assert not steps.canceled().vertices


def test_step_of_a_second_attempt_takes_the_place_of_the_first() -> None:
    steps, view = OpenSteps(), BuildView(0.0)
    first = ProgressBatch(vertices=[vertex("a", 10)])
    steps.take(first)
    view.apply(first, 1.0)
    view.apply(steps.canceled(), 2.0)
    (step,) = view.shown
    assert step.completed
    assert step.canceled
    view.apply(ProgressBatch(vertices=[vertex("a", 20)]), 3.0)
    assert step.running
    view.apply(ProgressBatch(vertices=[vertex("a", 20, 22)]), 4.0)
    assert view.shown == [step]
    assert step.completed
    assert not step.error
