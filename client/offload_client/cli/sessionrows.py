"""Sessions of the gateway as rows of tables and as JSON."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

from offload_client.cli.tables import ago, rfc3339
from offload_client.sessions import statusview
from offload_core.errors import UsageError
from offload_core.units import format_duration
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.timestamp_pb2 import Timestamp

    from offload_proto.v1.sessions_service_pb2 import Session, SessionCost

_FIELD = re.compile(r"\{\{\s*(?:(json)\s+)?\.([A-Za-z]*)\s*\}\}")


def state_name(state: SessionState.ValueType) -> str:
    """Return a state as people write it, for example "running"."""
    return SessionState.Name(state).removeprefix("SESSION_STATE_").lower()


def cost_json(cost: SessionCost) -> dict[str, Any]:
    """Return an amount for machines; names are those of the API."""
    return {
        "micros": cost.micros,
        "currency": cost.currency,
        "micros_per_hour": cost.micros_per_hour,
    }


def money(cost: SessionCost) -> str:
    """Return an amount, for example "0.12 EUR"."""
    return statusview.money(cost.micros, cost.currency)


def session_view(session: Session) -> dict[str, Any]:
    """Return what the gateway knows of a session, for `statusview` and for machines."""
    activity = session.activity if session.HasField("activity") else None
    running = session.state == SessionState.SESSION_STATE_RUNNING
    now = time.time()
    view: dict[str, Any] = {
        "name": session.spec.name,
        "session_id": session.session_id,
        "account": session.owner,
        "project": session.project_id,
        "state": state_name(session.state),
        "idle": running and activity is not None and activity.HasField("pauses_at"),
        "reason": session.reason,
        "node_id": session.node_id,
        "engine_version": session.engine_version,
        "gpu": session.spec.gpu or any("gpu" in device for device in session.devices),
        "devices": list(session.devices),
        "shared_with": list(session.shared_with),
        "created_at": rfc3339(session.created_at),
        "started_at": rfc3339(session.ready_at),
        "ended_at": rfc3339(session.ended_at),
        "expires_at": rfc3339(session.expires_at),
        "age_seconds": _since(session.ready_at, now),
        "seconds_until_end": _until(session.expires_at, now),
        "used_seconds": round(session.used.ToMilliseconds() / 1000, 3),
        "cost": cost_json(session.cost) if session.HasField("cost") else None,
    }
    if session.HasField("limits"):
        limits = session.limits
        view["limits"] = {
            "cpu_millis": limits.cpu_millis,
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "idle_timeout_seconds": limits.idle_timeout.ToMilliseconds() / 1000,
            "grace_seconds": limits.grace.ToMilliseconds() / 1000,
            "ttl_seconds": limits.ttl.ToMilliseconds() / 1000,
        }
    if activity is not None:
        view |= {
            "running_containers": activity.running_containers,
            "open_connections": activity.open_connections,
            "pauses_at": rfc3339(activity.pauses_at),
            "removed_at": rfc3339(activity.removed_at),
            "seconds_until_idle": _until(activity.pauses_at, now) if running else None,
            "seconds_until_removal": _until(activity.removed_at, now),
            "bytes_to_session": activity.received_bytes,
            "bytes_from_session": activity.sent_bytes,
            "disk_bytes": activity.disk_bytes,
        }
    return view


def _since(stamp: Timestamp, now: float) -> float | None:
    return round(max(0.0, now - stamp.ToMilliseconds() / 1000), 1) if stamp.seconds else None


def _until(stamp: Timestamp, now: float) -> float | None:
    return round(max(0.0, stamp.ToMilliseconds() / 1000 - now), 1) if stamp.seconds else None


def session_row(session: Session, *, here: str, current: str) -> dict[str, str]:
    """Return the columns of one session.

    Args:
        session: of the gateway.
        here: docker context that leads to it on this machine; empty for none.
        current: docker context in use.
    """
    view = session_view(session)
    mark = " *" if here and here == current else ""
    return {
        "ID": session.session_id,
        "Name": session.spec.name,
        "Owner": session.owner,
        "Project": session.project_id,
        "State": statusview.state_text(view),
        "Node": session.node_id or "-",
        "Created": ago(session.created_at),
        "Used": format_duration(view["used_seconds"]),
        "Cost": money(session.cost) if session.HasField("cost") else "-",
        "Context": f"{here}{mark}" or "-",
        "Reason": session.reason,
        "GPU": "yes" if view["gpu"] else "no",
    }


def fill_template(template: str, row: Mapping[str, str]) -> str:
    r"""Return one line of a template of docker's form, such as "{{.ID}}\t{{.State}}".

    Raises:
        UsageError: it names a column that there is not, or uses more of Go's templates.
    """

    def value(match: re.Match[str]) -> str:
        as_json, name = match[1], match[2]
        if not name and as_json:
            return json.dumps(dict(row))
        if name not in row:
            raise UsageError(f"--format has no column {match[0]}; there are {', '.join(row)}")
        return json.dumps(row[name]) if as_json else row[name]

    text = template.replace(r"\t", "\t").replace(r"\n", "\n")
    filled, rest = _FIELD.sub(value, text), _FIELD.sub("", text)
    if "{{" in rest:
        raise UsageError(
            "--format takes table, json, and templates of columns such as '{{.ID}} {{.State}}'"
        )
    return filled
