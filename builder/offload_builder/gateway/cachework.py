"""Usage, pruning and promotion of the layer cache: which nodes are asked, and one answer of all.

With a shared store one node answers for it and the others for their disks; without one each node
has a cache of its own, and every node is asked for everything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.cachetrust import scope_name
from offload_builder.gateway.nodetasks import ask_node
from offload_core.errors import NodeLostError, OffloadError
from offload_proto.v1 import cache_service_pb2 as cache_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry

log = structlog.get_logger(__name__)

USAGE_SECONDS = 20.0
PRUNE_SECONDS = 120.0
PROMOTE_SECONDS = 60.0
WHY_SECONDS = 20.0


@dataclass(frozen=True)
class Answers:
    """What nodes said.

    Attributes:
        full: answer of the node that was asked for the shared store as well; None without nodes.
        others: answers of the other nodes.
        silent: nodes that did not answer.
    """

    full: nodes_pb.CacheTaskReply | None
    others: tuple[nodes_pb.CacheTaskReply, ...]
    silent: tuple[str, ...]

    def all(self) -> list[nodes_pb.CacheTaskReply]:
        """Return the answers, the full one first."""
        return [*([] if self.full is None else [self.full]), *self.others]


class CacheWork:
    """Asks nodes. Belongs to the event loop; names of scopes in answers are those for people."""

    def __init__(self, nodes: NodeRegistry) -> None:
        self._nodes = nodes

    async def usage(
        self, project_id: str, hung: set[str]
    ) -> tuple[cache_pb.CacheUsage, tuple[str, ...]]:
        """Return the sizes of one project, and the nodes that did not answer.

        Args:
            project_id: the project.
            hung: nodes that did not answer for another project and are not asked; this adds those
                that do not answer now, so that many projects wait for them once.
        """

        def task(node_only: bool) -> nodes_pb.CacheTask:
            wanted = nodes_pb.UsageTask(node_only=node_only)
            return nodes_pb.CacheTask(project_id=project_id, usage=wanted)

        answers = await self._ask_all(project_id, task, USAGE_SECONDS, hung)
        hung.update(answers.silent)
        merged = merge_usage([reply.usage for reply in answers.all()])
        if answers.full is None:
            merged.shared_problem = "no node of the pool could be asked"
        return merged, answers.silent

    async def prune(
        self, project_id: str, wanted: cache_pb.PruneFilter, *, dry_run: bool
    ) -> cache_pb.PruneResponse:
        """Remove entries, or say what would go.

        Args:
            project_id: the project.
            wanted: what goes; its scope is the part of `scope_id` after the project.
            dry_run: only say.

        Raises:
            NodeLostError: there is no node to ask.
            OffloadError: the shared store could not be worked on.
        """

        def task(node_only: bool) -> nodes_pb.CacheTask:
            prune = nodes_pb.PruneTask(filter=wanted, dry_run=dry_run, node_only=node_only)
            return nodes_pb.CacheTask(project_id=project_id, prune=prune)

        answers = await self._ask_all(project_id, task, PRUNE_SECONDS)
        if answers.full is None:
            raise _nobody(answers.silent)
        return cache_pb.PruneResponse(
            result=merge_pruned([reply.prune for reply in answers.all()]),
            silent_node_ids=answers.silent,
        )

    async def promote(self, project_id: str, task: nodes_pb.PromoteTask) -> cache_pb.PromoteResult:
        """Copy the entries of one scope to another.

        Raises:
            NodeLostError: there is no node to ask.
            OffloadError: it did not work.
        """

        def make(node_only: bool) -> nodes_pb.CacheTask:
            request = nodes_pb.CacheTask(project_id=project_id, promote=task)
            request.promote.node_only = node_only
            return request

        answers = await self._ask_all(project_id, make, PROMOTE_SECONDS)
        if answers.full is None:
            raise _nobody(answers.silent)
        # Each has entries of its own: all without a shared store, else those not uploaded yet.
        results = [reply.promote for reply in answers.all()]
        return cache_pb.PromoteResult(
            entries=sum(item.entries for item in results),
            refused=sum(item.refused for item in results),
        )

    async def why(
        self, node_id: str, project_id: str, task: nodes_pb.WhyTask
    ) -> cache_pb.WhyResult:
        """Ask the node that ran a build, else any other, which steps missed, and why.

        Raises:
            NodeLostError: there is no node to ask.
            OffloadError: what the last node said that was asked.
        """
        nodes = sorted(self._of_project(project_id), key=lambda node: node.node_id != node_id)
        failure: OffloadError = _nobody(())
        for node in nodes:
            request = nodes_pb.CacheTask(project_id=project_id, why=task)
            try:
                return (await ask_node(node, request, WHY_SECONDS)).why
            except OffloadError as error:
                failure = error
        raise failure

    def _of_project(self, project_id: str) -> list[AttachedNode]:
        return [node for node in self._nodes.connected() if _serves(node, project_id)]

    async def _ask_all(
        self,
        project_id: str,
        make: Callable[[bool], nodes_pb.CacheTask],
        timeout: float,
        hung: Collection[str] = (),
    ) -> Answers:
        """Ask one node for everything, and then the others for what only they know."""
        nodes = sorted(
            self._of_project(project_id), key=lambda node: (node.heartbeat.draining, node.node_id)
        )
        silent = [node.node_id for node in self._nodes.away() if _serves(node, project_id)]
        silent += [node.node_id for node in nodes if node.node_id in hung]
        nodes = [node for node in nodes if node.node_id not in hung]
        full: nodes_pb.CacheTaskReply | None = None
        while nodes and full is None:
            node = nodes.pop(0)
            try:
                full = await ask_node(node, make(False), timeout)
            except NodeLostError as error:
                log.warning("cache.task.unanswered", node_id=node.node_id, error=error.message)
                silent.append(node.node_id)
        replies = await asyncio.gather(*(self._ask(node, make(True), timeout) for node in nodes))
        silent += [
            node.node_id for node, reply in zip(nodes, replies, strict=True) if reply is None
        ]
        others = tuple(reply for reply in replies if reply is not None)
        return Answers(full, others, tuple(sorted(silent)))

    @staticmethod
    async def _ask(
        node: AttachedNode, task: nodes_pb.CacheTask, timeout: float
    ) -> nodes_pb.CacheTaskReply | None:
        try:
            return await ask_node(node, task, timeout)
        except OffloadError as error:
            log.warning("cache.task.unanswered", node_id=node.node_id, error=error.message)
            return None


def merge_usage(parts: Sequence[cache_pb.CacheUsage]) -> cache_pb.CacheUsage:
    """Return one usage of all; the first has the numbers of the shared store.

    Nodes without a shared store each have entries of their own: their scopes are added up.
    """
    merged = cache_pb.CacheUsage()
    if parts:
        merged.CopyFrom(parts[0])
        del merged.scopes[:]
        del merged.nodes[:]
    scopes: dict[str, cache_pb.ScopeUsage] = {}
    for part in parts:
        merged.nodes.extend(part.nodes)
        for scope in part.scopes:
            known = scopes.setdefault(scope.scope, cache_pb.ScopeUsage(scope=scope.scope))
            _add_scope(known, scope)
    for scope in sorted(scopes.values(), key=lambda item: (-item.layer_bytes, item.scope)):
        scope.scope = _for_people(scope.scope)
        merged.scopes.append(scope)
    merged.nodes.sort(key=lambda node: node.node_id)
    return merged


def _add_scope(known: cache_pb.ScopeUsage, other: cache_pb.ScopeUsage) -> None:
    known.entries += other.entries
    known.layer_bytes += other.layer_bytes
    known.own_bytes += other.own_bytes
    if other.written_at.ToNanoseconds() > known.written_at.ToNanoseconds():
        known.written_at.CopyFrom(other.written_at)
        known.member, known.build_id = other.member, other.build_id
    if other.used_at.ToNanoseconds() > known.used_at.ToNanoseconds():
        known.used_at.CopyFrom(other.used_at)


def merge_pruned(parts: Sequence[cache_pb.PruneResult]) -> cache_pb.PruneResult:
    """Return what went in all; an entry that several nodes name went once."""
    merged = cache_pb.PruneResult(freed_bytes=sum(part.freed_bytes for part in parts))
    known: dict[tuple[str, str], cache_pb.PrunedEntry] = {}
    for part in parts:
        for entry in part.entries:
            known.setdefault((entry.scope, entry.entry_id), entry)
    for entry in sorted(known.values(), key=lambda item: (item.scope, item.entry_id)):
        merged.entries.add().CopyFrom(entry)
        merged.entries[-1].scope = _for_people(entry.scope)
    return merged


def _for_people(element: str) -> str:
    return scope_name(f"/{element}")


def _serves(node: AttachedNode, project_id: str) -> bool:
    return not node.token.project_ids or project_id in node.token.project_ids


def _nobody(silent: Sequence[str]) -> NodeLostError:
    names = f" ({', '.join(silent)} did not answer)" if silent else ""
    return NodeLostError(f"there is no node that could be asked about the cache{names}")
