"""The firewall of a node: projects come and go, policies change, connections are told."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import OrderedDict
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.firewall import ruleset
from offload_builder.egress.firewall.addresses import project_addresses, project_count
from offload_builder.egress.firewall.namebook import NameBook
from offload_builder.egress.firewall.namecheck import NameCheck, Permit
from offload_builder.egress.firewall.nflog import ConnectionLog, Logged
from offload_builder.egress.firewall.projectnet import STEPS, ProjectNetwork
from offload_builder.egress.firewall.router import OUR_NAMESPACE, Router
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import Attempt
from offload_core.aio import finish
from offload_core.errors import InternalError, NotFoundError, OffloadError, QuotaExceededError

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from offload_builder.egress.firewall.firstbytes import Claim
    from offload_builder.egress.firewall.projectnet import Interior
    from offload_builder.egress.firewall.tcppackets import Flow
    from offload_builder.egress.policy.model import Address, EffectivePolicy, Protocol
    from offload_builder.egress.resolver.contract import Admission

_log = structlog.get_logger(__name__)

_DETACH_SECONDS = 20.0
_CHANGE_SECONDS = 120.0
"""A change that has begun is seen to its end: else nobody knew which rules the kernel has."""
_MAX_ASKED = 1024
_COUNTED = re.compile(r"counter p(\d+)_(\w+) \{\s+packets (\d+)")


@dataclass(frozen=True, slots=True)
class Connection:
    """A new connection of a project, or a packet without one.

    Attributes:
        time: seconds since 1970.
        project: key of the project, as it was attached.
        stage: what decided; the policy's evaluation names the rule.
        source: who asked.
        from_step: a step with an address of its own; else BuildKit, or a step that has its.
        address: where to.
        port: None for protocols without ports.
        protocol: `ANY` for one that policies do not name.
        policy: what was in force when this was read.
        asked: the name that was asked for within the connection, where that was refused.
        why: a sentence, where no name would have done.
    """

    time: float
    project: str
    stage: Stage
    source: Address
    from_step: bool
    address: Address
    port: int | None
    protocol: Protocol
    policy: EffectivePolicy
    asked: str = ""
    why: str = ""

    @property
    def allowed(self) -> bool:
        """Whether it passed."""
        return self.stage is Stage.ALLOWED


@dataclass
class _Attached:
    network: ProjectNetwork
    policy: EffectivePolicy
    evaluator: Evaluator
    book: NameBook
    in_force: ruleset.InForce
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class EgressFirewall:
    """Everything of a node's projects passes here; an async context manager.

    Args:
        data: directory of the node.
        listener: called in the event loop for each connection that the kernel tells of, at most
            100 per second, project and stage; it must not take long.
        outside: namespace of the machine.
    """

    def __init__(
        self,
        data: Path,
        listener: Callable[[Connection], None] | None = None,
        *,
        outside: Path = OUR_NAMESPACE,
    ) -> None:
        self.router = Router(data, outside)
        self._listener = listener
        self._attached: dict[str, _Attached] = {}
        self._slots: dict[int, str] = {}
        self._next_slot = 0
        self._marks = itertools.count(1)
        self._names: NameCheck
        self._asked: OrderedDict[tuple[object, ...], tuple[str, str]] = OrderedDict()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Make the router.

        Raises:
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the rules.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.router)
            await stack.enter_async_context(ConnectionLog(self.router.inside, self._logged))
            self._names = await stack.enter_async_context(NameCheck(self.router, self._permits))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for key in list(self._attached):
            await self._detach(key)
        await self._stack.aclose()

    @asynccontextmanager
    async def attach(
        self, key: str, policy: EffectivePolicy, interior: Interior = STEPS
    ) -> AsyncIterator[ProjectNetwork]:
        """Give a project a network while the context is open.

        Args:
            key: names it in all other calls; two projects never have the same.
            policy: holds from the beginning.
            interior: what the network is for.

        Raises:
            QuotaExceededError: the node has no room for more projects.
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the rules.
        """
        if key in self._attached:
            raise QuotaExceededError(f"project {key} has a network already")
        slot = self._free_slot()
        self._slots[slot] = key
        try:
            network = ProjectNetwork(key, project_addresses(slot), self.router, interior)
        except BaseException:
            del self._slots[slot]
            raise
        try:
            in_force = self._next(policy)
            # Ten thousand rules take as long to write as a network to make.
            writing = asyncio.ensure_future(
                asyncio.to_thread(ruleset.prepare_policy, network.addresses, policy, in_force.mark)
            )
            try:
                await self._names.watch(slot)
                await network.connect()
                text = ruleset.add_project(network.addresses) + await writing
            finally:
                writing.cancel()
            await finish(self._put_in(key, network, policy, in_force, text), _CHANGE_SECONDS)
        except BaseException:
            if key in self._attached:
                await finish(self._detach(key), _DETACH_SECONDS)
                raise
            self._names.forget(slot)
            await finish(network.close(), _DETACH_SECONDS)
            del self._slots[slot]
            raise
        _log.info("egress.project.attached", project_id=key, device=network.addresses.device)
        try:
            yield network
        finally:
            await finish(self._detach(key), _DETACH_SECONDS)

    async def _put_in(
        self,
        key: str,
        network: ProjectNetwork,
        policy: EffectivePolicy,
        in_force: ruleset.InForce,
        text: str,
    ) -> None:
        addresses = network.addresses
        await self.router.change(text)
        try:
            await self.router.change(ruleset.switch_policy(addresses, ruleset.NOTHING, in_force))
        except OffloadError:
            left = ruleset.remove_project(addresses, ruleset.NOTHING)
            await self.router.change(left + ruleset.forget_policy(addresses, in_force))
            raise
        book = NameBook(ruleset.policy_name(addresses, in_force.mark))
        self._attached[key] = _Attached(network, policy, Evaluator(policy), book, in_force)

    def _next(self, policy: EffectivePolicy) -> ruleset.InForce:
        # Connections of a project that had this slot before have a mark that counts no more.
        return ruleset.InForce(len(ruleset.policy_layers(policy)), next(self._marks))

    def _free_slot(self) -> int:
        count = project_count()
        for step in range(count):
            # The one that was free for longest: late news of a project is not another's.
            slot = (self._next_slot + step) % count
            if slot not in self._slots:
                self._next_slot = slot + 1
                return slot
        raise QuotaExceededError(f"the node has room for {count} projects at a time")

    async def _detach(self, key: str) -> None:
        found = self._attached.pop(key, None)
        if found is None:
            return
        addresses = found.network.addresses
        try:
            # The device first: from then on nothing passes, whatever happens to the rest.
            await found.network.close()
            self._names.forget(addresses.slot)
            async with found.turn:
                await self.router.change(ruleset.remove_project(addresses, found.in_force))
        except OffloadError as error:
            _log.error("egress.project.stuck", project_id=key, error=error.message)
            return
        del self._slots[addresses.slot]
        _log.info("egress.project.detached", project_id=key, device=addresses.device)

    async def apply(
        self, key: str, policy: EffectivePolicy, admissions: Sequence[Admission] = ()
    ) -> None:
        """Give a project another policy, in one step.

        Connections that it allows as well go on. All others are reset at their next packet.

        Args:
            key: of the project.
            policy: holds from the return of this call on.
            admissions: addresses of names that hold under it; all others are forgotten.

        Raises:
            NotFoundError: the project is not attached.
            OffloadError: it cannot be done; the old policy holds.
        """
        found = self._found(key)
        async with found.turn:
            # It may have been detached since.
            self._found(key)
            await finish(self._replace(found, policy, admissions), _CHANGE_SECONDS)
        _log.info("egress.policy.applied", project_id=key, version=policy.base.version)

    async def _replace(
        self, found: _Attached, policy: EffectivePolicy, admissions: Sequence[Admission]
    ) -> None:
        addresses, in_force = found.network.addresses, self._next(policy)
        own = ruleset.policy_name(addresses, in_force.mark)
        fresh = NameBook(own)
        plan = fresh.plan([one for one in admissions if not one.open_only])
        past = NameBook(ruleset.past(own))
        held = past.plan([one for one in admissions if one.open_only])
        text = await asyncio.to_thread(ruleset.prepare_policy, addresses, policy, in_force.mark)
        await self.router.change(text + plan.text + held.text)
        try:
            await self.router.change(ruleset.switch_policy(addresses, found.in_force, in_force))
        except OffloadError:
            await self.router.change(ruleset.forget_policy(addresses, in_force))
            raise
        fresh.commit(plan)
        found.policy, found.book, found.in_force = policy, fresh, in_force
        found.evaluator = Evaluator(policy)
        await self._names.judge_again(addresses.slot)

    async def admit(self, project: str, admissions: Sequence[Admission]) -> None:
        """Let a project reach addresses that a name led to; see `resolver.contract.AddressBook`.

        Raises:
            NotFoundError: the project is not attached.
            OffloadError: it cannot be done.
        """
        found = self._found(project)
        async with found.turn:
            plan = found.book.plan(admissions)
            if plan.lines:
                await self.router.change(plan.text)
            found.book.commit(plan)

    async def cut(self, key: str) -> None:
        """Let nothing of a project pass where its rules cannot be changed, until `mend`.

        Raises:
            NotFoundError: the project is not attached.
            ConfigError: it cannot be done.
        """
        await self._found(key).network.cut()
        _log.error("egress.project.cut", project_id=key)

    async def mend(self, key: str) -> None:
        """Undo `cut`.

        Raises:
            NotFoundError: the project is not attached.
            ConfigError: it cannot be done.
        """
        await self._found(key).network.mend()
        _log.info("egress.project.mended", project_id=key)

    def policy(self, key: str) -> EffectivePolicy:
        """Return the policy in force.

        Raises:
            NotFoundError: the project is not attached.
        """
        return self._found(key).policy

    async def open_registry(self, key: str) -> socket.socket:
        """Return a socket that listens at a project's gateway address, for its BuildKit only.

        Steps with a network of their own are refused. The caller closes it.

        Raises:
            NotFoundError: the project is not attached.
            OffloadError: it cannot be done.
        """
        addresses = self._found(key).network.addresses
        made = await self.router.inside.listen_tcp(addresses.gateway_v4)
        try:
            await self.router.change(ruleset.open_registry(addresses, made.getsockname()[1]))
        except BaseException:
            made.close()
            raise
        return made

    async def listen(self, address: Address, port: int) -> socket.socket:
        """Return a socket that listens in the router at one of its addresses.

        Raises:
            InternalError: the address cannot be used.
        """
        try:
            made = await self.router.inside.listen_tcp(str(address), port)
        except OSError as error:
            raise InternalError(f"cannot listen at {address}:{port}: {error.strerror}") from error
        made.setblocking(False)
        return made

    async def serve_connected(self, key: str, doors: Iterable[tuple[Address, int]]) -> None:
        """Let a project reach just these addresses and ports, which stand for connectors.

        Raises:
            NotFoundError: the project is not attached.
            OffloadError: it cannot be done; nothing has changed.
        """
        addresses = self._found(key).network.addresses
        await self.router.change(ruleset.serve_connected(addresses, doors))

    async def counts(self) -> dict[str, dict[Stage, int]]:
        """Return per project how many new connections each stage has decided; none is left out."""
        text = await self.router.change(f"list counters table {ruleset.TABLE}")
        found: dict[str, dict[Stage, int]] = {key: {} for key in self._attached}
        for slot, stage, packets in _COUNTED.findall(text):
            key = self._slots.get(int(slot))
            if key in found:
                found[key][Stage(stage)] = int(packets)
        return found

    def _found(self, key: str) -> _Attached:
        found = self._attached.get(key)
        if found is None:
            raise NotFoundError(f"project {key} has no network at this node")
        return found

    def _permits(self, slot: int, claim: Claim, flow: Flow) -> Permit | None:
        """Judge what a connection of a project asks for by name."""
        found = self._attached.get(self._slots.get(slot, ""))
        if found is None:
            return None
        refused, reason = "", claim.refused
        for host, port in claim.hosts:
            there = port is None
            attempt = Attempt(host, flow.address if there else None, port or flow.port)
            if not found.evaluator.verdict(attempt).allowed:
                refused = refused or host
        if refused or reason:
            # The kernel tells of the refusal, and does not know what was asked for.
            self._asked[slot, flow.source, flow.address, flow.port] = (refused, reason)
            while len(self._asked) > _MAX_ASKED:
                self._asked.popitem(last=False)
        return Permit(not (refused or reason), found.in_force.mark)

    def _logged(self, logged: Logged) -> None:
        found = self._attached.get(self._slots.get(logged.slot, ""))
        if found is None or self._listener is None:
            return
        addresses = found.network.addresses
        own = (addresses.daemon_v4, addresses.daemon_v6)
        asked, why = "", ""
        if logged.stage is Stage.NAME:
            key = (logged.slot, logged.source, logged.address, logged.port)
            asked, why = self._asked.get(key, ("", ""))
        self._listener(
            Connection(
                logged.time,
                found.network.key,
                logged.stage,
                logged.source,
                str(logged.source) not in own,
                logged.address,
                logged.port,
                logged.protocol,
                found.policy,
                asked,
                why,
            )
        )
