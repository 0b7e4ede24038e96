"""How one session is shown, to people and to programs; with nothing imported that costs time.

A view is a dictionary of what JSON has: times are RFC 3339, lengths of time are seconds. It is made
from what the helper of a session says, or from what the gateway says, see `cli/sessionrows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.sessions.records import SessionRecord

UNKNOWN = "N/A"
URGENT_SECONDS = 300.0
OVER = ("ended", "lost", "failed")


def view_of_helper(
    record: SessionRecord, answer: Mapping[str, Any] | None, now: float, current: str
) -> dict[str, Any]:
    """Return the view of a session of this machine.

    Args:
        record: of the session.
        answer: of its helper to "status"; None when none answers.
        now: seconds since 1970.
        current: docker context in use.
    """
    view: dict[str, Any] = {
        "name": record.name,
        "session_id": record.session_id,
        "account": record.owner,
        "project": record.project_id,
        "gateway": record.gateway,
        "node_id": record.node_id,
        "gpu": record.gpu,
        "age_seconds": round(max(0.0, now - record.started), 1) if record.started else None,
        "context": record.context,
        "in_use": bool(record.context) and record.context == current,
        "helper": "running" if answer is not None else "not running",
    }
    if answer is None:
        view["state"] = "unknown"
        view["reason"] = f"its helper does not run; start it with: offload use {record.name}"
        return view
    activity: Mapping[str, Any] = answer.get("activity") or {}
    state = str(answer.get("state") or "unknown")
    warnings: Sequence[str] = answer.get("warnings") or ()
    pauses_at, removed_at = activity.get("pauses_at"), activity.get("removed_at")
    if state in OVER:
        clear = f"clear it away with: offload stop {record.name}"
        return view | {"state": state, "reason": f"{answer.get('reason') or 'it ended'}; {clear}"}
    if answer.get("reconnecting_since") is not None:
        view["helper"] = "reconnecting"
    remaining = answer.get("remaining_seconds")
    return view | {
        "state": state,
        "idle": state == "running" and pauses_at is not None,
        "reason": str(answer.get("reason") or answer.get("problem") or ""),
        "warning": warnings[-1] if warnings else "",
        "seconds_until_idle": _left(pauses_at, now) if state == "running" else None,
        "seconds_until_removal": _left(removed_at, now),
        "seconds_until_end": None if remaining is None else round(float(remaining), 1),
        "running_containers": activity.get("running_containers"),
        "open_connections": activity.get("open_connections"),
        "disk_bytes": activity.get("disk_bytes"),
        "bytes_to_session": activity.get("received_bytes"),
        "bytes_from_session": activity.get("sent_bytes"),
        "ports": list(answer.get("ports") or ()),
        "directories": list(answer.get("directories") or ()),
    }


def _left(moment: float | None, now: float) -> float | None:
    return None if moment is None else round(max(0.0, float(moment) - now), 1)


def state_text(view: Mapping[str, Any]) -> str:
    """Return the state with docker's idle marker, for example "Running (Idle)"."""
    text = str(view.get("state") or "unknown").capitalize()
    if view.get("helper") == "reconnecting":
        text += " (Reconnecting)"
    elif view.get("idle"):
        text += " (Idle)"
    return text


def money(micros: int, currency: str) -> str:
    """Return an amount, for example "0.12 EUR"."""
    amount = micros / 1e6
    digits = 2 if amount >= 1 or not micros else 4
    return f"{amount:.{digits}f} {currency}".rstrip()


def length(seconds: float | None) -> str:
    """Return a length of time, for example "3m20s"."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def port_text(port: Mapping[str, Any]) -> str:
    """Return a forwarded port as docker lists it, for example "127.0.0.1:8081->80/tcp"."""
    host = str(port.get("address") or "")
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port.get('port', '?')}->{port.get('container_port', '?')}"


def directory_text(directory: Mapping[str, Any]) -> str:
    """Return how a directory of this machine stands, for example "/app (copying, 5MB there)"."""
    text, state = str(directory.get("path") or ""), directory.get("state")
    if state == "same":
        return text
    if state == "ended":
        return f"{text} (not synchronised any more)"
    if state == "reconnecting":
        return f"{text} (reconnecting)"
    here, there = directory.get("entries_here") or 0, directory.get("entries_there") or 0
    sent = size(directory.get("sent_bytes") or 0)
    return f"{text} (copying: {there} of {here} files, {sent} there)"


def size(count: int) -> str:
    """Return bytes as docker prints them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}TB"


def pretty_lines(view: Mapping[str, Any]) -> list[str]:
    """Return aligned lines: docker's five first, then what else is known."""
    rows = [
        ("Account", str(view.get("account") or UNKNOWN)),
        ("State", state_text(view)),
        ("Session started", _started(view)),
        ("Time until idle", _until_pause(view)),
        ("GPU", "yes" if view.get("gpu") else "no"),
    ]
    rows += [(name, text) for name, text in _further(view) if text]
    width = max(len(name) for name, _ in rows) + 3
    lines = [f"{name}:".ljust(width) + text for name, text in rows]
    if warning := view.get("warning"):
        lines.append(f"WARNING: {warning}")
    return [f"Session {view.get('name') or ''}".rstrip(), *(f"  {line}" for line in lines)]


def urgent_news(view: Mapping[str, Any]) -> str:
    """Return one sentence that a person should read now; empty for none."""
    if view.get("state") in OVER:
        return f"The session has ended: offload stop {view.get('name')}"
    if view.get("helper") == "not running":
        return f"The session has no helper: offload use {view.get('name')}"
    left = view.get("seconds_until_end")
    if left is not None and left < URGENT_SECONDS:
        return f"The session ends with everything in it in {length(left)}."
    left = view.get("seconds_until_idle")
    if left is not None and left < URGENT_SECONDS / 5:
        return f"The session pauses in {length(left)} unless it is used."
    return ""


def _further(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    ports: Sequence[Mapping[str, Any]] = view.get("ports") or ()
    cost: Mapping[str, Any] = view.get("cost") or {}
    rate = cost.get("micros_per_hour")
    price = money(cost["micros"], cost.get("currency", "")) if cost else ""
    if rate:
        price += f" ({money(rate, cost.get('currency', ''))} per hour)"
    context = str(view.get("context") or "")
    shared = ", ".join(view.get("shared_with") or ())
    running = view.get("running_containers")
    return [
        ("Project", str(view.get("project") or "")),
        ("Node", str(view.get("node_id") or "")),
        ("Engine", str(view.get("engine_version") or "")),
        ("Devices", ", ".join(view.get("devices") or ())),
        ("Containers", "" if running is None else f"{running} running"),
        ("Ports", ", ".join(map(port_text, ports))),
        ("Directories", ", ".join(map(directory_text, view.get("directories") or ()))),
        ("Bytes", _bytes(view)),
        ("Disk", size(view["disk_bytes"]) if view.get("disk_bytes") else ""),
        ("Time used", "" if view.get("used_seconds") is None else length(view["used_seconds"])),
        ("Cost", price),
        ("Ends at the latest", _end(view)),
        ("Removed in", length(view["seconds_until_removal"])
         if view.get("seconds_until_removal") is not None else ""),
        ("Shared with", shared),
        ("Docker context", context + (" (in use)" if context and view.get("in_use") else "")),
        ("Reason", str(view.get("reason") or "")),
    ]  # fmt: skip


def _started(view: Mapping[str, Any]) -> str:
    age = view.get("age_seconds")
    return UNKNOWN if age is None else f"{length(age)} ago"


def _until_pause(view: Mapping[str, Any]) -> str:
    if view.get("state") == "paused":
        return "paused"
    if view.get("seconds_until_idle") is not None:
        return length(view["seconds_until_idle"])
    return "in use" if view.get("state") == "running" else UNKNOWN


def _end(view: Mapping[str, Any]) -> str:
    left = view.get("seconds_until_end")
    return "" if left is None else f"in {length(left)}"


def _bytes(view: Mapping[str, Any]) -> str:
    there, back = view.get("bytes_to_session"), view.get("bytes_from_session")
    if there is None and back is None:
        return ""
    return f"{size(there or 0)} there, {size(back or 0)} back"
