"""What builds reached in the network and were refused, for people and for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from offload_client.build.outputfiles import check_file, replace_file
from offload_client.bytepipe import in_thread
from offload_client.cli.tables import format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.progress.cells import visible_line
from offload_core.errors import OffloadError
from offload_core.trust import join_address
from offload_proto.v1.egress_service_pb2 import LearnPolicyRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings
    from offload_proto.v1.egress_service_pb2 import LearnPolicyResponse
    from offload_proto.v1.events_pb2 import EgressUse

LEARN_SECONDS = 60.0
_HEADINGS = ("TARGET", "PROTOCOL", "TIMES", "RULE", "STEP")


class NetworkReport:
    """The report at the end of a build.

    Args:
        invocation: of the command.
        shown: print it, for people.
        file: name of a file for programs; empty for none.
    """

    def __init__(self, invocation: Invocation, *, shown: bool, file: str = "") -> None:
        self._invocation = invocation
        self._shown = shown
        self._path = invocation.path(file) if file else None

    def prepare(self) -> None:
        """Refuse a file that cannot be written.

        Raises:
            InvalidValueError: it is a directory.
            ConfigError: it cannot be written.
        """
        if self._path is not None:
            check_file(self._path)

    async def give(self, build_id: str, settings: Settings, connections: Connections) -> None:
        """Ask the gateway, and print or write what it says; that it fails does not fail a build.

        Args:
            build_id: of the build; empty when it had none.
            settings: which gateway knows it.
            connections: of the process.
        """
        if not build_id or not (self._shown or self._path is not None):
            return
        try:
            calls = await GatewayCalls.open(self._invocation, settings, connections)
            reply = await learn(calls, [build_id])
            if self._path is not None:
                replace_file(self._path, json.dumps(report_json(reply), indent=2) + "\n")
        except OffloadError as error:
            self._invocation.err(
                f"WARNING: there is no network report: {error.message}; "
                f"see it later with: offload inspect {build_id}"
            )
            return
        if self._shown:
            text = report_text(reply)
            await in_thread(lambda: self._invocation.err(text), name="network-report")


async def learn(
    calls: GatewayCalls, build_ids: Sequence[str], *, with_refused: bool = False
) -> LearnPolicyResponse:
    """Return what builds did in the network, and a proposal for a policy.

    Raises:
        OffloadError: what the gateway says.
    """
    request = LearnPolicyRequest(build_ids=build_ids, with_refused=with_refused)
    reply: LearnPolicyResponse = await calls.call(
        calls.egress().LearnPolicy, request, timeout=LEARN_SECONDS
    )
    return reply


def report_text(reply: LearnPolicyResponse) -> str:
    """Return a report for people, the proposal at its end."""
    parts: list[str] = []
    for title, allowed in (("Refused in the network:", False), ("Reached in the network:", True)):
        rows = [
            (target(item.use), item.use.protocol, item.use.count, item.use.rule_id, item.step)
            for item in reply.uses
            if item.use.allowed is allowed
        ]
        if rows:
            parts.append(f"{title}\n{_table(rows)}")
    if not parts:
        return "Network report: the build reached nothing, as far as the firewall saw"
    if reply.more:
        parts.append("There is more; see offload inspect --format json")
    parts.append(f"Proposal for an allow-list, in the form of a policy:\n\n{reply.text.rstrip()}")
    return "\n" + "\n\n".join(parts)


def report_json(reply: LearnPolicyResponse) -> dict[str, Any]:
    """Return a report for programs; what was reached and refused is as in `offload inspect`."""
    return {
        "refused": [_json(item) for item in reply.uses if not item.use.allowed],
        "reached": [_json(item) for item in reply.uses if item.use.allowed],
        "more": reply.more,
        "proposal": reply.text,
    }


def _json(item: Any) -> dict[str, Any]:
    return {"build": item.build_id, **use_json(item.use, item.step)}


def _table(rows: Iterable[tuple[str, str, int, str, str]]) -> str:
    shown = [
        (_visible(where), protocol, str(count), rule or "-", _visible(step) or "-")
        for where, protocol, count, rule, step in rows
    ]
    return format_table(_HEADINGS, shown)


def _visible(text: str) -> str:
    return visible_line(text.encode())


def target(use: EgressUse) -> str:
    """Return what was reached or refused, for people."""
    host = use.host or use.address
    if use.url or not use.port:
        return use.url or (f"{host} ({use.address})" if use.host and use.address else host)
    return join_address(host, use.port)


def use_json(use: EgressUse, step: str) -> dict[str, Any]:
    """Return one use for programs; `policy learn` understands what was reached."""
    return {
        "step": step or None,
        "host": use.host or None,
        "address": use.address or None,
        "port": use.port or None,
        "protocol": use.protocol,
        "url": use.url or None,
        "rule": use.rule_id,
        "rule_text": use.rule_text,
        "place": use.place,
        "reason": use.reason,
        "count": use.count,
        "first_at": rfc3339(use.first_at) if use.HasField("first_at") else None,
    }
