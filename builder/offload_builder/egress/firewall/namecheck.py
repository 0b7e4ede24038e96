"""Lets connections to addresses of names pass once they have asked for a name that is allowed.

The rules of a project log the first segments of such a connection in full and drop them. Here they
are put together until the name in them is known. If it is allowed the connection gets the mark of
the policy, so that the kernel passes all that follows, and the bytes are sent on from here; else it
gets one by which its next segment, which repeats the bytes, is refused. What is lost on the way to
this program is repeated by the sender. Nothing passes without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.firewall.connmarks import ConnectionMarks
from offload_builder.egress.firewall.firstbytes import MAX_HEAD_BYTES, Claim, read_claim
from offload_builder.egress.firewall.nflog import open_log, read_packets
from offload_builder.egress.firewall.ruleset import (
    CLAIM_WORD,
    OWN_MARK,
    REFUSED_MARK,
    claim_group,
)
from offload_builder.egress.firewall.tcppackets import (
    SEQUENCES,
    SYN,
    Flow,
    Segment,
    make_acknowledgement,
    make_packets,
    parse_segment,
)
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.egress.firewall.router import Router
    from offload_builder.egress.policy.model import Address

_log = structlog.get_logger(__name__)

MAX_WAITING = 1024
"""Connections of a project that have not said their name yet; the oldest makes room."""
MAX_KNOWN = 32_768
"""Connections of a project whose name is remembered for changes of the policy."""
MAX_AHEAD_BYTES = 1 << 16
MAX_AHEAD = 64
"""Bytes and pieces of one connection that are kept behind bytes that have not come yet."""
_COPY_BYTES = 0xFFFF
_RECEIVE_BYTES = 1 << 18
_QUEUE_BYTES = 1 << 22
_RCVBUFFORCE = 33
"""SO_RCVBUFFORCE of Linux: beyond the bound of the system, which a burst would fill at once."""
_TURN_SECONDS = 0.002
_JUDGED_PER_TURN = 256
_IPV6_HDRINCL = 36


@dataclass(frozen=True, slots=True)
class Permit:
    """What a policy says about the names of a connection, and the mark that it gives."""

    allowed: bool
    mark: int


@dataclass(slots=True)
class Beginning:
    """The first bytes of a connection: those in order, and later ones by how far they are.

    Bytes that came once are kept as they were, whatever comes in their place.
    """

    begin: int
    data: bytearray = field(default_factory=bytearray)
    _ahead: dict[int, bytes] = field(default_factory=dict)
    _ahead_bytes: int = 0

    def take(self, segment: Segment) -> bool:
        """Keep the bytes of a segment; return whether all of them were here already."""
        offset = (segment.sequence - self.begin) % SEQUENCES
        if offset > len(self.data):
            return self._keep(offset, segment.data)
        new = segment.data[len(self.data) - offset :]
        self.data += new
        while new and self._ahead and min(self._ahead) <= len(self.data):
            first = min(self._ahead)
            piece = self._ahead.pop(first)
            self._ahead_bytes -= len(piece)
            self.data += piece[len(self.data) - first :]
        return not new

    def _keep(self, offset: int, data: bytes) -> bool:
        old = len(self._ahead.get(offset, b""))
        if old >= len(data):
            return True
        room = MAX_AHEAD_BYTES - self._ahead_bytes + old
        if offset < MAX_HEAD_BYTES and len(data) <= room and len(self._ahead) < MAX_AHEAD:
            self._ahead[offset] = data
            self._ahead_bytes += len(data) - old
        return False


@dataclass(slots=True)
class _Project:
    """The connections of one project: no other one can use up its room or its turn."""

    socket: socket.socket
    waiting: OrderedDict[Flow, Beginning] = field(default_factory=OrderedDict)
    known: OrderedDict[Flow, Claim] = field(default_factory=OrderedDict)


class NameCheck:
    """Reads the first bytes of connections in a router; an async context manager.

    Args:
        router: whose rules log them.
        permits: called in the event loop with the slot of a project, what a connection asks for,
            and the connection; None for a project that is no more.
    """

    def __init__(
        self, router: Router, permits: Callable[[int, Claim, Flow], Permit | None]
    ) -> None:
        self._router = router
        self._permits = permits
        self._marks: ConnectionMarks
        self._raw: dict[int, socket.socket] = {}
        self._answering: dict[int, socket.socket] = {}
        self._projects: dict[int, _Project] = {}

    async def __aenter__(self) -> Self:
        """Open what it sends and marks with.

        Raises:
            ConfigError: the kernel does not let us.
        """
        inside = self._router.inside
        self._marks = await inside.run(ConnectionMarks)
        try:
            self._raw = await inside.run(_open_raw, 0)
            self._answering = await inside.run(_open_raw, OWN_MARK)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for slot in list(self._projects):
            self.forget(slot)
        self._close()

    def _close(self) -> None:
        for one in (*self._raw.values(), *self._answering.values()):
            one.close()
        self._marks.close()

    async def watch(self, slot: int) -> None:
        """Begin to read the first bytes of a project; until then they go nowhere.

        Raises:
            ConfigError: the kernel does not let us.
        """
        made = await self._router.inside.run(open_log, claim_group(slot), _COPY_BYTES, 1)
        with contextlib.suppress(OSError):
            made.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _QUEUE_BYTES)
        self._projects[slot] = project = _Project(made)
        asyncio.get_running_loop().add_reader(made, self._read, slot, project)

    async def judge_again(self, slot: int) -> None:
        """Refuse the open connections of a project whose name its policy no longer allows."""
        project = self._projects.get(slot)
        if project is None:
            return
        for number, (flow, claim) in enumerate(list(project.known.items())):
            if number % _JUDGED_PER_TURN == _JUDGED_PER_TURN - 1:
                await asyncio.sleep(0)
            permit = self._permits(slot, claim, flow)
            refused = permit is None or not permit.allowed
            # It may have ended meanwhile, and another one begun in its place.
            if refused and project.known.get(flow) is claim:
                del project.known[flow]
                self._mark(flow, REFUSED_MARK)

    def forget(self, slot: int) -> None:
        """Forget a project that is no more; nothing happens when it is not known."""
        project = self._projects.pop(slot, None)
        if project is not None:
            asyncio.get_running_loop().remove_reader(project.socket)
            project.socket.close()

    def _read(self, slot: int, project: _Project) -> None:
        # A flood must not keep the loop from everything else, other projects among it.
        end = time.perf_counter() + _TURN_SECONDS
        while time.perf_counter() < end:
            try:
                data = project.socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue
                raise
            for _, word, packet in read_packets(data):
                segment = parse_segment(packet)
                if word == CLAIM_WORD and segment is not None:
                    self._take(slot, project, segment)

    def _take(self, slot: int, project: _Project, segment: Segment) -> None:
        flow = segment.flow
        if segment.flags & SYN:
            _begin(project, flow, (segment.sequence + 1) % SEQUENCES)
            return
        beginning = project.waiting.get(flow)
        if beginning is None:
            # Repeated while it was looked at, or nobody knows where it began: then it cannot be
            # said what it asks for.
            if flow not in project.known:
                self._mark(flow, REFUSED_MARK)
            return
        repeated = beginning.take(segment)
        data = bytes(beginning.data)
        claim = read_claim(data)
        if claim is None:
            if len(data) < MAX_HEAD_BYTES:
                if repeated:
                    # Who has to repeat sends nothing new before it hears that this has arrived.
                    packet = make_acknowledgement(segment, beginning.begin + len(data))
                    self._transmit(self._answering, flow.source, packet)
                return
            claim = Claim(refused="the first bytes name nothing for too long")
        permit = self._permits(slot, claim, flow)
        del project.waiting[flow]
        if permit is None or not permit.allowed:
            self._mark(flow, REFUSED_MARK)
        elif self._mark(flow, permit.mark):
            project.known[flow] = claim
            while len(project.known) > MAX_KNOWN:
                project.known.popitem(last=False)
            self._send(segment, beginning.begin, data)

    def _mark(self, flow: Flow, value: int) -> bool:
        try:
            return self._marks.mark(flow, value)
        except OSError as error:
            # It stays without a mark, so nothing of it passes.
            _log.warning("egress.name.mark_failed", error=str(error), address=str(flow.address))
            return False

    def _send(self, last: Segment, begin: int, data: bytes) -> None:
        for packet in make_packets(last, begin, data, self._router.mtu):
            self._transmit(self._raw, last.flow.address, packet)

    @staticmethod
    def _transmit(by: dict[int, socket.socket], target: Address, packet: bytes) -> None:
        try:
            by[target.version].sendto(packet, (str(target), 0))
        except OSError as error:
            # The sender repeats its bytes, and they pass by themselves or are answered then.
            _log.debug("egress.name.resend_failed", error=str(error))


def _begin(project: _Project, flow: Flow, begin: int) -> None:
    waiting = project.waiting.get(flow)
    if waiting is not None and waiting.begin == begin:
        return
    project.known.pop(flow, None)
    project.waiting[flow] = Beginning(begin)
    while len(project.waiting) > MAX_WAITING:
        project.waiting.popitem(last=False)


def _open_raw(mark: int) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    try:
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            found[version] = made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            if version == 6:
                made.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
    except OSError as error:
        for made in found.values():
            made.close()
        raise ConfigError(f"packets cannot be sent on: {error.strerror}") from error
    return found
