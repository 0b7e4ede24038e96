"""What members may ask for: names, sizes and numbers of sessions."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.gateway.sessions.table import QUEUED, SessionRecord, new_session_id
from offload_core.devices import MAX_NAME, read_wish
from offload_core.errors import InvalidValueError, QuotaExceededError, UsageError
from offload_core.nodelabels import check_label

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.duration_pb2 import Duration

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.sessions.active import ActiveSession, ActiveSessions
    from offload_builder.gateway.tokens import TokenRecord
    from offload_proto.v1 import sessions_service_pb2 as sessions_pb

DEFAULT_NAME = "default"
MAX_REQUEST_ID = 64
MAX_DEVICES = 16
MAX_LABELS = 16
MAX_SHARED = 50
MAX_OPEN = 10_000
"""In the whole pool, those that wait included, whatever the configuration says."""
MAX_DURATION_SECONDS = 366 * 86400
_MAX_NUMBER = 1 << 60
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


def checked_record(
    request: sessions_pb.StartSessionRequest, token: TokenRecord, trust_domain: str
) -> SessionRecord:
    """Return the record of a session that is asked for.

    Raises:
        UsageError: the request cannot be understood.
    """
    if not 1 <= len(request.request_id) <= MAX_REQUEST_ID:
        raise UsageError(f"a session needs a request_id of at most {MAX_REQUEST_ID} characters")
    spec = request.spec
    spec.name = spec.name or DEFAULT_NAME
    if _NAME.fullmatch(spec.name) is None:
        raise InvalidValueError(
            f"{spec.name[:80]!a} cannot be the name of a session: at most 40 letters, digits, - "
            "and _, with a letter or a digit first"
        )
    _check_devices(spec)
    _check_sizes(spec)
    return SessionRecord(
        session_id=new_session_id(),
        request_id=request.request_id,
        project_id=request.project_id,
        owner=token.name,
        token_id=token.token_id,
        role=token.role,
        name=spec.name,
        state=QUEUED,
        created_at=datetime.now(UTC),
        spec=spec.SerializeToString(),
        trust_domain=trust_domain,
    )


def _check_devices(spec: sessions_pb.SessionSpec) -> None:
    if len(spec.devices) > MAX_DEVICES:
        raise InvalidValueError(f"a session has at most {MAX_DEVICES} devices")
    for name in spec.devices:
        wish = read_wish(f"device={name}") if len(name) <= MAX_NAME else None
        if wish is None or wish.name != name:
            raise InvalidValueError(
                f"{name[:100]!a} is no name of a device; use VENDOR/CLASS=NAME, for example "
                "nvidia.com/gpu=0"
            )
    if len(spec.node_labels) > MAX_LABELS:
        raise InvalidValueError(f"a session names at most {MAX_LABELS} labels")
    for key, value in spec.node_labels.items():
        check_label(key, value)


def _check_sizes(spec: sessions_pb.SessionSpec) -> None:
    for name in ("cpu_millis", "memory_bytes", "disk_bytes"):
        if not 0 <= getattr(spec, name) < _MAX_NUMBER:
            raise InvalidValueError(f"{name} of a session must not be negative, and not as large")
    if spec.HasField("idle_timeout"):
        _check_duration("idle_timeout", spec.idle_timeout)
    if spec.HasField("ttl"):
        _check_duration("ttl", spec.ttl)


def _check_duration(name: str, value: Duration) -> None:
    if not 1 <= value.seconds <= MAX_DURATION_SECONDS:
        raise InvalidValueError(
            f"{name} of a session is between 1 second and {MAX_DURATION_SECONDS // 86400} days"
        )


def check_bounds(config: GatewayConfig, sessions: ActiveSessions, record: SessionRecord) -> None:
    """Refuse a session that is one too many, or whose name is taken.

    Raises:
        UsageError: its owner has an open session of this name.
        QuotaExceededError: a bound is reached.
    """
    same = sessions.find_name(record.project_id, record.owner, record.name)
    if same is not None:
        raise UsageError(
            f'you have an open session "{record.name}" in the project "{record.project_id}" '
            f"already, {same.session_id}",
            hint="stop it first, or give the new one another name",
        )
    _check_count(
        sessions, lambda item: item.record.owner == record.owner, config.sessions_per_member,
        "you have", hint="stop one of them",
    )  # fmt: skip
    _check_count(
        sessions,
        lambda item: item.record.project_id == record.project_id,
        config.sessions_per_project,
        f'the project "{record.project_id}" has',
        hint="wait until one of them ends, or ask an administrator",
    )
    _check_count(sessions, lambda _: True, MAX_OPEN, "the pool has", hint="try again later")


def _check_count(
    sessions: ActiveSessions,
    counts: Callable[[ActiveSession], bool],
    bound: int,
    who: str,
    hint: str,
) -> None:
    count = sum(counts(session) for session in sessions.all())
    if bound and count >= bound:
        word = "session" if count == 1 else "sessions"
        raise QuotaExceededError(
            f"{who} {count} open {word}, and more than {bound} may not be open at once", hint=hint
        )
