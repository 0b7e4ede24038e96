"""What a client knows of its build, over all its connections to the node."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_client.build.sendingstep import SendingStep
from offload_client.progress.attempts import StepNames
from offload_client.progress.opensteps import OpenSteps

if TYPE_CHECKING:
    from offload_client.build.contextanswers import Listed
    from offload_client.progress.display import Display
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Independence, Result


class RunRecord:
    """Outlives the connection, so that the build can be taken up where it was lost.

    Attributes:
        result: set when the build has ended.
        heard: the node has said something, so it has taken the build.
        acknowledged_bytes: content that the node has for good.
        last_sequence: number of the last progress batch that was shown.
        listings: what was listed for the node, by its request.
        outputs_begun: outputs whose stream the node has announced and that may be partly written.
        outputs_done: those of them that are complete.
        independent: the build goes on when this client leaves.
        needs: what it needs this client for, in the node's words; empty when nothing is known.
        left: the client has left, or is leaving, a build that goes on.
        leave_sent: the node was asked for that.
        over: nothing more is wanted from the node.
        warned: sentences that were told already.
    """

    def __init__(self, build_id: str, display: Display, run: int = 0) -> None:
        """Record a build.

        Args:
            build_id: of this run.
            display: shows it.
            run: how many runs of the same build were lost before.
        """
        self.build_id = build_id
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.heard = False
        self.acknowledged_bytes = 0
        self.last_sequence = 0
        self.listings: dict[int, Listed] = {}
        self.outputs_begun: set[int] = set()
        self.outputs_done: set[int] = set()
        self.independent = False
        self.needs = ""
        self.left = False
        self.leave_sent = False
        self.over = False
        self.warned: set[str] = set()
        self.step = SendingStep(display)
        self._display = display
        self._open_steps = OpenSteps()
        self._names = StepNames(run)
        self._changed = asyncio.Event()

    def show(self, batch: ProgressBatch) -> None:
        """Show progress; what was shown already, over a former connection, is left out."""
        if batch.sequence:
            if batch.sequence <= self.last_sequence:
                return
            self.last_sequence = batch.sequence
        self._display.feed(self._names.batch(batch))
        self._open_steps.take(batch)
        self.step.watch(batch)

    def stand(self, message: Independence) -> None:
        """Note whether the build goes on without this client."""
        self.independent, self.needs = message.independent, message.needs
        if not self.independent:
            # That is also how the node refuses to let the client go.
            self.left = False
        self._changed.set()

    async def standing_changed(self) -> None:
        """Wait until the node says something new about what it needs the client for."""
        self._changed.clear()
        await self._changed.wait()

    @property
    def repeatable(self) -> bool:
        """Whether the build could be started again as if nothing had happened."""
        return self._open_steps.repeatable

    @property
    def lost_with_node(self) -> bool:
        """Whether all that is known of its end is that its node stopped or was restarted."""
        return self.result.done() and self.result.result().failure.node_lost

    @property
    def unsettled(self) -> bool:
        """Whether nothing is known of its end, but perhaps that the node was lost."""
        return not self.result.done() or self.lost_with_node

    @property
    def output_interrupted(self) -> bool:
        """Whether an output was on its way, which a node streams once only."""
        return bool(self.outputs_begun - self.outputs_done)

    def close(self) -> None:
        """End what is shown as running: nobody tells of it any more."""
        for listed in self.listings.values():
            listed.scan.stop()
        self.step.close(complete=False)
        if self.unsettled and not self.left:
            self._display.feed(self._names.batch(self._open_steps.canceled()))
