"""What builds reached and were refused, as the firewall and the resolver of the node tell it."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from offload_builder.egress.connectors.addresses import ConnectedAddresses
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import Attempt, Layer, Place, Protocol, Verdict
from offload_core.trust import join_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.egress.connectors.tunnels import Arrival
    from offload_builder.egress.firewall.lifecycle import Connection
    from offload_builder.egress.policy.model import EffectivePolicy
    from offload_builder.egress.resolver.contract import Answered, Refusal

_log = structlog.get_logger(__name__)

LIST_COMMAND = "offload connect --list"
MAX_NAMES = 4096
"""Addresses of one place whose last name is remembered."""
CHECK_RULE = "check-names"
_OF_THE_NODE = {
    Stage.NODE: "the node itself is never reached by builds",
    Stage.NEIGHBOUR: "other projects of the node are never reached by builds",
}


@dataclass(frozen=True, slots=True)
class Told:
    """A build reached something, or was refused.

    Attributes:
        time: seconds since 1970.
        place: whose it is: the directory name of a trust domain.
        source: address of the step, or of the place's BuildKit.
        from_step: a step with an address of its own asked.
        host: the name that was asked for, or that led to the address last; empty for none.
        address: where to; empty where the name itself was refused.
        port: None for names and for protocols without ports.
        protocol: what was spoken.
        verdict: what decided.
        note: what people should know beside the rule; empty for nothing.
    """

    time: float
    place: str
    source: str
    from_step: bool
    host: str
    address: str
    port: int | None
    protocol: Protocol
    verdict: Verdict
    note: str = ""

    def __str__(self) -> str:
        where = self.host or self.address
        if self.port is None:
            return where
        return join_address(where, self.port)


class EgressTold:
    """Hears of connections and names, names the rule, and passes it on to listeners.

    Attributes:
        listeners: called in the event loop with each; they must not take long.
        connected: addresses that stand for names which connectors serve.
    """

    def __init__(self) -> None:
        self.connected = ConnectedAddresses()
        self.listeners: list[Callable[[Told], None]] = []
        self._names: dict[str, OrderedDict[str, str]] = {}
        self._evaluators: dict[str, tuple[EffectivePolicy, Evaluator]] = {}

    def forget(self, place: str) -> None:
        """Forget the names of a place that is no more."""
        self._names.pop(place, None)
        self._evaluators.pop(place, None)

    def connection(self, connection: Connection) -> None:
        """Hear of a new connection."""
        address = str(connection.address)
        names = self._names.get(connection.project)
        host = connection.asked or (names.get(address, "") if names is not None else "")
        host = self.connected.name(connection.project, address) or host
        verdict, note = self._verdict(connection, host), ""
        if connection.stage is Stage.CONNECTOR and verdict.allowed:
            note = "no connector serves it now"
            verdict = replace(verdict, allowed=False, reason=f"{note}; see {LIST_COMMAND}")
        self._tell(
            Told(
                connection.time,
                connection.project,
                str(connection.source),
                connection.from_step,
                host,
                address,
                connection.port,
                connection.protocol,
                verdict,
                note,
            )
        )

    def uncarried(self, arrival: Arrival, policy: EffectivePolicy, reason: str) -> None:
        """Hear of a connection to a name that connectors serve, which could not be had."""
        attempt = Attempt(arrival.name, None, arrival.port)
        verdict = self._evaluator(arrival.place, policy).verdict(attempt)
        self._tell(
            Told(
                time.time(),
                arrival.place,
                arrival.source,
                True,
                arrival.name,
                arrival.address,
                arrival.port,
                Protocol.TCP,
                replace(verdict, allowed=False, reason=reason),
                reason,
            )
        )

    def refused(self, refusal: Refusal) -> None:
        """Hear of a name, or addresses behind one, that a build did not get."""
        verdict = Verdict(
            allowed=False,
            rule_id=refusal.rule_id,
            rule_text=refusal.rule_text,
            place=refusal.place,
            reason=refusal.reason,
            layer=refusal.layer,
        )
        for address in refusal.addresses or ("",):
            self._tell(
                Told(
                    refusal.time,
                    refusal.project,
                    refusal.source,
                    True,
                    refusal.name,
                    address,
                    None,
                    Protocol.ANY,
                    verdict,
                )
            )

    def of_node(self, place: str, host: str, address: str, port: int, verdict: Verdict) -> None:
        """Hear of what the node itself did not reach for builds of a place."""
        self._tell(Told(time.time(), place, "", False, host, address, port, Protocol.TCP, verdict))

    def answered(self, answer: Answered) -> None:
        """Hear of an answer: connections to its addresses get the name."""
        names = self._names.setdefault(answer.project, OrderedDict())
        for address in answer.addresses:
            names[str(ipaddress.ip_address(address))] = answer.name
            names.move_to_end(str(ipaddress.ip_address(address)))
        while len(names) > MAX_NAMES:
            names.popitem(last=False)

    def _verdict(self, connection: Connection, host: str) -> Verdict:
        if (reason := _OF_THE_NODE.get(connection.stage)) is not None:
            return Verdict(
                allowed=False,
                rule_id=f"protected-{connection.stage.value}",
                rule_text=reason,
                place=Place("built in"),
                reason=reason,
                layer=Layer.POOL,
            )
        if connection.stage is Stage.NAME and not connection.asked:
            return Verdict(
                allowed=False,
                rule_id=CHECK_RULE,
                rule_text="connections to addresses of names say which name they ask for",
                place=Place("built in"),
                reason=connection.why or "the connection does not say which name it asks for",
                layer=Layer.POOL,
            )
        evaluator = self._evaluator(connection.project, connection.policy)
        attempt = Attempt(host or None, connection.address, connection.port, connection.protocol)
        found = evaluator.verdict(attempt)
        if found.allowed == connection.allowed or connection.stage is Stage.CONNECTOR:
            return found
        # The policy changed in between, or the address got its name from an earlier answer.
        without = evaluator.verdict(
            Attempt(None, connection.address, connection.port, connection.protocol)
        )
        return without if without.allowed == connection.allowed else found

    def _evaluator(self, place: str, policy: EffectivePolicy) -> Evaluator:
        known = self._evaluators.get(place)
        if known is None or known[0] is not policy:
            known = self._evaluators[place] = (policy, Evaluator(policy))
        return known[1]

    def _tell(self, told: Told) -> None:
        event = "egress.reached" if told.verdict.allowed else "egress.denied"
        level = _log.debug if told.verdict.allowed else _log.info
        level(
            event,
            place=told.place,
            source=told.source,
            target=str(told),
            address=told.address,
            protocol=told.protocol.value,
            rule=told.verdict.rule_id,
        )
        for listener in self.listeners:
            listener(told)
