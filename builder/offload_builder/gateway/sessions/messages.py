"""Sessions as the API shows them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from offload_builder.gateway.sessions.cost import cost_message
from offload_builder.gateway.sessions.table import PAUSED, RUNNING, STOPPING
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

if TYPE_CHECKING:
    from offload_builder.gateway.sessions.table import SessionRecord


def session_message(record: SessionRecord, used_milliseconds: int) -> sessions_pb.Session:
    """Return a session as members see it.

    Args:
        record: the session.
        used_milliseconds: the time that counts until now.
    """
    message = sessions_pb.Session(
        session_id=record.session_id,
        spec=record.wish,
        project_id=record.project_id,
        owner=record.owner,
        shared_with=record.shared_with,
        state=record.state,
        reason=record.stop_reason if record.state == STOPPING else record.reason,
        node_id=record.node_id,
        devices=record.devices,
        engine_version=record.engine_version,
    )
    message.created_at.FromDatetime(record.created_at)
    message.used.FromMilliseconds(used_milliseconds)
    if record.ended_at is not None:
        message.ended_at.FromDatetime(record.ended_at)
    if record.ready_at is not None:
        message.ready_at.FromDatetime(record.ready_at)
        message.limits.ParseFromString(record.limits)
        ttl = message.limits.ttl.ToTimedelta()
        if record.ended_at is None and ttl > timedelta(0):
            message.expires_at.FromDatetime(record.ready_at + ttl)
    if record.state in (RUNNING, PAUSED):
        message.activity.ParseFromString(record.activity)
    if (cost := cost_message(record, used_milliseconds)) is not None:
        message.cost.CopyFrom(cost)
    return message
