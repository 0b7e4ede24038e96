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


def named(name: str, started: int, completed: int | None = None) -> Vertex:
    message = vertex(name, started, completed)
    message.name = name
    return message


def test_build_is_repeatable_until_a_command_runs_and_the_context_is_there() -> None:
    steps = OpenSteps()
    context = "[internal] load build context"
    steps.take(ProgressBatch(vertices=[named(context, 1), named("[1/3] FROM debian", 1, 2)]))
    assert steps.repeatable
    steps.take(ProgressBatch(vertices=[named("[2/3] RUN apt-get update", 2)]))
    assert steps.repeatable
    steps.take(ProgressBatch(vertices=[named(context, 1, 3)]))
    assert not steps.repeatable


def test_cached_commands_do_not_count() -> None:
    steps = OpenSteps()
    cached = named("[2/3] RUN apt-get update", 2, 2)
    cached.cached = True
    steps.take(ProgressBatch(vertices=[cached, named("[3/3] COPY . .", 2)]))
    assert steps.repeatable


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
