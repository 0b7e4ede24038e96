"""Tasks of the gateway, and the bounds that it tells, at a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.node.cachedesk import CacheDesk
from offload_builder.node.projectlimits import LimitBook, ProjectLimit
from offload_core.errors import CacheUnavailableError
from offload_proto.v1.cache_service_pb2 import WhyResult
from offload_proto.v1.nodes_service_pb2 import CacheTask, CacheTaskReply, ProjectLimits, WhyTask

if TYPE_CHECKING:
    from pathlib import Path

WHY = CacheTask(task_id="t1", project_id="shop", why=WhyTask(build_id="b1"))


async def test_handler_answers_its_kind_of_task():
    desk = CacheDesk()

    async def why(task: CacheTask) -> CacheTaskReply:
        return CacheTaskReply(why=WhyResult(build_id=task.why.build_id))

    desk.register("why", why)
    reply = await desk.answer(WHY)
    assert (reply.task_id, reply.why.build_id, reply.error) == ("t1", "b1", "")


async def test_task_without_a_handler_is_refused_in_words():
    reply = await CacheDesk().answer(WHY)
    assert (reply.task_id, reply.error_reason) == ("t1", "USAGE")
    assert "why" in reply.error
    assert "this task" in (await CacheDesk().answer(CacheTask(task_id="t2"))).error


async def test_what_goes_wrong_is_in_the_answer():
    desk = CacheDesk()

    async def known(_: CacheTask) -> CacheTaskReply:
        raise CacheUnavailableError("the bucket is away")

    async def unknown(_: CacheTask) -> CacheTaskReply:
        raise ZeroDivisionError

    desk.register("why", known)
    reply = await desk.answer(WHY)
    assert (reply.error, reply.error_reason) == ("the bucket is away", "CACHE_UNAVAILABLE")
    desk.register("why", unknown)
    assert (await desk.answer(WHY)).error_reason == "INTERNAL"


def limits(**values: int) -> ProjectLimits:
    message = ProjectLimits()
    message.projects.add(project_id="shop", **values).shared_idle.FromSeconds(60)
    return message


def test_bounds_are_known_after_a_restart_without_a_gateway(tmp_path: Path):
    LimitBook(tmp_path / "limits.json").take(limits(shared_keep_bytes=5, node_keep_bytes=7))
    book = LimitBook(tmp_path / "limits.json")
    assert book.of("shop") == ProjectLimit(5, 60.0, 7)
    assert book.of("other") == ProjectLimit()
    assert book.node_bounds() == {"shop": 7}


def test_listeners_hear_of_changes_only(tmp_path: Path):
    book = LimitBook(tmp_path / "limits.json")
    heard: list[int] = []
    book.on_change(lambda: heard.append(1))
    for message in (limits(node_keep_bytes=7), limits(node_keep_bytes=7), ProjectLimits()):
        book.take(message)
    assert len(heard) == 2
    assert book.node_bounds() == {}


def test_damaged_file_counts_as_empty(tmp_path: Path):
    path = tmp_path / "limits.json"
    for text in ("{", "[]", '{"shop": {"unknown": 1}}', '{"shop": 1}'):
        path.write_text(text)
        assert LimitBook(path).of("shop") == ProjectLimit()
