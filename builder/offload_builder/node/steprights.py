"""What the steps of one build may do and use, and why one was not let."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.outofmemory import find_out_of_memory
from offload_builder.node.entitlements import Permitted, explain_refusal, granted
from offload_builder.node.steplimits import StepBounds, resource_attributes
from offload_core.errors import UsageError
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.node.buildgroups import BuildGroups
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.diskwatch import DiskNotes
    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.builds_service_pb2 import Ticket

MAX_PRIVATE_INPUTS = 200
"""Secrets of one build, which are held in memory with up to 500 KiB each; and agents."""
_NO_AGENT = "forwarded from the client"
_NO_SECRET = re.compile(r"secret ([A-Za-z0-9._-]{1,100}): not found")
_CLOCK_SECONDS = 2.0
"""Times of files are as coarse as the kernel's tick; some file systems round them to seconds."""


@dataclass(frozen=True)
class StepPolicy:
    """What a node permits the builds of one project.

    Attributes:
        permitted: rights that they may ask for.
        bounds: of each step.
        daemon_root: directory of the project's BuildKit.
        groups: control groups of its builds.
        ended_for_disk: the steps that were ended for the disk's sake.
    """

    permitted: Permitted
    bounds: StepBounds
    daemon_root: Path
    groups: BuildGroups
    ended_for_disk: DiskNotes

    @classmethod
    def of(
        cls,
        config: NodeConfig,
        project_id: str,
        daemon_root: Path,
        groups: BuildGroups,
        ended_for_disk: DiskNotes,
    ) -> StepPolicy:
        """Return that of a node's configuration."""
        permitted, bounds = Permitted.of(config, project_id), StepBounds.of(config)
        return cls(permitted, bounds, daemon_root, groups, ended_for_disk)


def _missing_input(message: str) -> str:
    """Return what to give to a step that lacks a secret or an SSH agent; empty for others."""
    if _NO_AGENT in message:
        return "Give --ssh default to forward your SSH agent, or --ssh ID=PATH for a socket or key."
    if (found := _NO_SECRET.search(message)) is not None:
        return f"Give --secret id={found[1]},src=FILE or --secret id={found[1]},env=NAME."
    return ""


class StepRights:
    """The rights and bounds of one build.

    Attributes:
        entitlements: what BuildKit is told that the build may do.
        attributes: bounds of its steps, for the frontend.
    """

    def __init__(self, spec: BuildSpec, ticket: Ticket, policy: StepPolicy) -> None:
        """Check what is asked for.

        Raises:
            AccessDeniedError: an entitlement is not permitted.
            UsageError: a bound is wrong, or more than the node gives.
        """
        for what, ids in (("secrets", spec.secret_ids), ("SSH agents", spec.ssh_ids)):
            if len(ids) > MAX_PRIVATE_INPUTS:
                raise UsageError(f"a build has at most {MAX_PRIVATE_INPUTS} {what}")
        self.entitlements = granted(spec, ticket, policy.permitted)
        self.attributes = resource_attributes(spec.resources, policy.bounds)
        self._policy = policy
        self._ticket = ticket
        self._since = time.time() - _CLOCK_SECONDS

    def explain_refusal(self, message: str) -> str:
        """Return who permits the right for want of which a step was refused; empty for others."""
        return explain_refusal(message, self._ticket, self._policy.permitted)

    async def explain(self, failure: Failure) -> None:
        """Add to a failure what BuildKit does not tell: who permits a right, what memory was."""
        why = _missing_input(failure.message) or self.explain_refusal(failure.message)
        if failure.process_exit_code:
            memory = await asyncio.to_thread(
                find_out_of_memory, self._policy.daemon_root, failure.message, self._since
            )
            groups, build_id = self._policy.groups, self._ticket.build_id
            if memory is not None:
                failure.kind = Failure.KIND_OUT_OF_MEMORY
                beyond = groups.memory_of(build_id)
                why = memory.describe_build(beyond) if memory.within(beyond) else memory.describe()
            elif ended := self._policy.ended_for_disk.find(failure.message, self._since):
                why = ended
            elif limit := groups.processes_of(build_id):
                why = (
                    f"The build had as many processes as it may have, {limit}, so no further one "
                    'could be started ("Resource temporarily unavailable"). Let it run fewer at '
                    "once, or ask who runs the node for more (build_pids)."
                )
        if why:
            failure.message += f"\n{why}"
