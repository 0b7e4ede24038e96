"""What nodes say about builds, and what their silence means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.audit import OK, AuditLog, Event
from offload_builder.gateway.history import FINAL_STATES, START_AGAIN, BuildRecord
from offload_builder.gateway.plaintext import plain_line, plain_text
from offload_builder.gateway.tokens import role_name
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.active_builds import ActiveBuild, ActiveBuilds
    from offload_builder.gateway.admission import Admission
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.steptimes import StepTimes

log = structlog.get_logger(__name__)

LATE_NEWS_SECONDS = 5.0
"""How long a node that is back may take to say how a build ended that it no longer runs."""

_RUNNING = builds_pb.BUILD_STATE_RUNNING


class BuildTracking:
    """Follows builds that are at nodes. Belongs to the event loop."""

    def __init__(
        self,
        builds: ActiveBuilds,
        admission: Admission,
        nodes: NodeRegistry,
        restart_grace: float,
        step_times: StepTimes,
        audit: AuditLog,
    ) -> None:
        """Set the seconds in which nodes may come back after a restart of the gateway."""
        self._builds = builds
        self._admission = admission
        self._nodes = nodes
        self._restart_grace = restart_grace
        self._step_times = step_times
        self._audit = audit

    async def restore(self) -> None:
        """Take up what a former gateway process left unfinished.

        Builds at nodes are kept if their node comes back with them, builds in the queue if their
        client repeats its request; the others are lost.
        """
        for record in await self._builds.history.unfinished():
            build = self._builds.add(record)
            if build.queued:
                self._admission.readmit(build)
            else:
                build.arrived = True
                why = f"the gateway restarted and node {build.node_id} did not come back"
                build.start_grace(self._restart_grace, self._lose, why)

    async def attached(self, node: AttachedNode) -> None:
        """Compare what a node runs with what it should."""
        running = set(node.hello.running_build_ids)
        for build in self._builds.at_node(node.node_id):
            if build.build_id in running:
                self._keep(build, node)
            elif build.arrived:
                why = f"node {node.node_id} came back without it"
                build.start_grace(LATE_NEWS_SECONDS, self._lose, why)
        for build_id in sorted(running):
            active = self._builds.find(build_id)
            if active is None:
                await self._unknown(node, build_id)
            elif active.queued:
                # It was handed over just before a restart.
                self._builds.run(active, node.node_id)
                active.arrived = True
            elif active.node_id != node.node_id:
                node.cancel_build(build_id, f"the build is at node {active.node_id}")
        self._admission.node_changed(node.node_id)

    def _keep(self, build: ActiveBuild, node: AttachedNode) -> None:
        if build.arrived:
            build.stop_grace()
        if build.cancel_reason:
            node.cancel_build(build.build_id, build.cancel_reason)

    async def _unknown(self, node: AttachedNode, build_id: str) -> None:
        record = await self._builds.history.find(build_id)
        if record is None:
            node.cancel_build(build_id, "the gateway does not know this build")
        elif self._builds.find(build_id) is not None:
            return
        elif record.state == builds_pb.BUILD_STATE_LOST and record.node_id == node.node_id:
            # Clients talk to nodes directly: the build may have gone on all the time.
            self._revive(record)
        else:
            node.cancel_build(build_id, "the build has already ended")

    def _revive(self, record: BuildRecord) -> None:
        log.info("build.revived", build_id=record.build_id, node_id=record.node_id)
        values = record.__dict__ | {"state": builds_pb.BUILD_STATE_RUNNING}
        build = self._builds.add(BuildRecord(**values))
        build.arrived = True
        self._builds.history.change(record.build_id, state=build.state, completed_at=None, error="")

    def offer_reply(self, node: AttachedNode, reply: nodes_pb.OfferReply) -> None:
        """Hand an answer to the one who waits for it."""
        future = node.offers.get(reply.build_id)
        if future is not None and not future.done():
            future.set_result(reply)
        elif reply.accepted:
            build = self._builds.find(reply.build_id)
            if build is None or build.node_id != node.node_id:
                node.cancel_build(reply.build_id, "the offer is no longer open")

    async def owns(self, node: AttachedNode, build_id: str) -> bool:
        """Return whether a build runs, or ran, at a node."""
        build = self._builds.find(build_id)
        if build is not None:
            return build.node_id == node.node_id
        if build_id == node.last_owned:
            return True
        record = await self._builds.history.find(build_id)
        if record is None or record.node_id != node.node_id:
            return False
        node.last_owned = build_id
        return True

    async def updated(self, node: AttachedNode, update: nodes_pb.BuildUpdate) -> None:
        """Take in news of a build."""
        build = self._builds.find(update.build_id)
        if build is not None and update.steps and build.node_id == node.node_id:
            await self._note_steps(build.record.project_id, update)
            build = self._builds.find(update.build_id)
        if build is None:
            await self._late_news(node, update)
            return
        if build.node_id != node.node_id:
            log.warning("build.update.refused", build_id=update.build_id, node_id=node.node_id)
            return
        if update.state in FINAL_STATES:
            # The next heartbeat says so too, but the slot is free now.
            node.heartbeat.running = max(0, node.heartbeat.running - 1)
            error = _error(update) or (
                build.cancel_reason if update.state == builds_pb.BUILD_STATE_CANCELED else ""
            )
            self._builds.end(build, update.state, error=error, **_columns(update))
            self._audit.note(ended_event(build.record, update))
            return
        build.arrived = True
        build.stop_grace()
        if columns := _columns(update):
            self._builds.history.change(update.build_id, **columns)

    async def _late_news(self, node: AttachedNode, update: nodes_pb.BuildUpdate) -> None:
        """Complete the record of a build that is over."""
        record = await self._builds.history.find(update.build_id)
        if record is None or record.node_id != node.node_id:
            log.warning("build.update.refused", build_id=update.build_id, node_id=node.node_id)
            return
        if update.steps:
            await self._note_steps(record.project_id, update)
        values = _columns(update)
        if record.state == builds_pb.BUILD_STATE_LOST and update.state == _RUNNING:
            self._revive(record)
        elif record.state == builds_pb.BUILD_STATE_LOST and update.state in FINAL_STATES:
            values |= {"state": update.state, "error": _error(update)}
        if values:
            self._builds.history.change(update.build_id, **values)

    async def _note_steps(self, project_id: str, update: nodes_pb.BuildUpdate) -> None:
        """Complete the numbers with the time that cached steps took when they last ran."""
        saved = await self._step_times.note(project_id, update.steps)
        update.stats.saved_milliseconds = saved

    def node_lost(self, node_id: str, why: str) -> None:
        """Give up the builds of a lost node."""
        for build in self._builds.at_node(node_id):
            self._lose(build, f"node {node_id} was lost: {why}")
        self._admission.wake()

    def node_changed(self, node_id: str) -> None:
        """Pass on that a node can do more, or less, than before."""
        self._admission.node_changed(node_id)

    def _lose(self, build: ActiveBuild, why: str) -> None:
        self._builds.end(build, builds_pb.BUILD_STATE_LOST, error=f"{why}{START_AGAIN}")


def ended_event(record: BuildRecord, update: nodes_pb.BuildUpdate) -> Event:
    """Return the record of a build's end, with the names of the secrets that it asked for."""
    name = builds_pb.BuildState.Name(update.state).removeprefix("BUILD_STATE_").lower()
    return Event(
        "build.ended",
        member=record.member,
        role=role_name(record.role),
        token_id=record.token_id,
        project_id=record.project_id,
        build_id=record.build_id,
        result=OK if update.state == builds_pb.BUILD_STATE_SUCCEEDED else name,
        secret_ids=tuple(update.secret_ids),
    )


def _error(update: nodes_pb.BuildUpdate) -> str:
    return plain_text(update.error, 4000)


def _columns(update: nodes_pb.BuildUpdate) -> dict[str, Any]:
    """Return the columns that an update changes; what it leaves out stays."""
    values: dict[str, Any] = {}
    if update.HasField("stats"):
        values["stats"] = update.stats.SerializeToString()
    if update.image_digest:
        values["image_digest"] = plain_line(update.image_digest, 80)
    if update.image_saved:
        values["image_saved"] = True
    if update.cache_state:
        values["cache_state"] = update.cache_state
    return values
