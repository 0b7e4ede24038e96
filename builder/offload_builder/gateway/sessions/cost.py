"""What sessions cost: rates of the pool, and amounts in millionths of its currency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.gateway.sessions.placement import is_gpu
from offload_core.devices import kind_of
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.sessions.table import SessionRecord

MICROS = 1_000_000
_HOUR_MILLISECONDS = 3_600_000


@dataclass(frozen=True)
class Rates:
    """Prices per hour, in millionths; no currency is no cost.

    Attributes:
        currency: as the administrator writes it; empty where the pool has no rates.
        session: of each session.
        gpu: of each GPU, beside that.
    """

    currency: str = ""
    session: int = 0
    gpu: int = 0

    @classmethod
    def of(cls, config: GatewayConfig) -> Rates:
        """Return the rates of a configuration."""
        return cls(
            config.cost_currency,
            round(config.cost_session_hour * MICROS),
            round(config.cost_gpu_hour * MICROS),
        )

    def per_hour(self, devices: Iterable[str], known: Iterable[str] = ()) -> int:
        """Return what a session with these devices costs in an hour.

        Args:
            devices: of the session, fully qualified.
            known: all devices of its node: "all" of a kind costs as much as each of them.
        """
        return self.session + self.gpu * count_gpus(devices, known)


def count_gpus(devices: Iterable[str], known: Iterable[str] = ()) -> int:
    """Return how many GPUs there are behind names of devices."""
    gpus = {device for device in devices if is_gpu(device)}
    # A GPU may have further names, by its serial number for example; its index is always there.
    others = {device for device in known if is_gpu(device) and device.rpartition("=")[2].isdigit()}
    count = 0
    for device in gpus:
        if device.endswith("=all"):
            kind = kind_of(device)
            count += max(1, sum(kind_of(other) == kind for other in others))
        else:
            count += 1
    return count


def amount(used_milliseconds: int, micros_per_hour: int) -> int:
    """Return the millionths that a time costs, rounded."""
    return (used_milliseconds * micros_per_hour + _HOUR_MILLISECONDS // 2) // _HOUR_MILLISECONDS


def cost_message(record: SessionRecord, used_milliseconds: int) -> sessions_pb.SessionCost | None:
    """Return what a session has cost; None where the pool had no rates when it began."""
    if not record.currency:
        return None
    return sessions_pb.SessionCost(
        micros=amount(used_milliseconds, record.micros_per_hour),
        currency=record.currency,
        micros_per_hour=record.micros_per_hour,
    )
