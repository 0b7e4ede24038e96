"""What sessions cost, and how it is summed up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from offload_builder.gateway.config import GatewayConfig
from offload_builder.gateway.sessions.cost import Rates, amount, cost_message, count_gpus
from offload_builder.gateway.sessions.table import ENDED, SessionRecord, SessionTotal
from offload_builder.gateway.sessions.usage import sum_up
from offload_core.errors import ConfigError

HOUR = 3_600_000
NODE = [f"nvidia.com/gpu={name}" for name in ("0", "1", "2", "GPU-f00", "all")]


def record(owner: str, used: int, currency: str = "EUR", rate: int = 100_000) -> SessionRecord:
    return SessionRecord(
        session_id="0" * 16, request_id="r", project_id="p", owner=owner, token_id="t", role=2,
        name="web", state=ENDED, created_at=datetime.now(UTC), used_milliseconds=used,
        currency=currency, micros_per_hour=rate,
    )  # fmt: skip


def test_rates_of_a_configuration_are_millionths_per_hour() -> None:
    config = GatewayConfig(cost_currency="EUR", cost_session_hour=0.1, cost_gpu_hour=2.5)
    rates = Rates.of(config)
    assert rates == Rates("EUR", 100_000, 2_500_000)
    assert rates.per_hour([]) == 100_000
    assert rates.per_hour(["nvidia.com/gpu=0", "x.example/nic=1"]) == 2_600_000


def test_all_gpus_cost_as_much_as_each_of_them() -> None:
    assert count_gpus(["nvidia.com/gpu=all"], NODE) == 3
    assert count_gpus(["nvidia.com/gpu=all"]) == 1
    assert count_gpus(["nvidia.com/gpu=0", "nvidia.com/gpu=1"], NODE) == 2


def test_amounts_are_rounded_and_unset_without_a_currency() -> None:
    assert amount(HOUR, 100_000) == 100_000
    assert amount(18, 100_000) == 1
    assert amount(0, 100_000) == 0
    assert cost_message(record("ann", HOUR, currency="", rate=0), HOUR) is None
    cost = cost_message(record("ann", HOUR), 2 * HOUR)
    assert cost is not None
    assert (cost.micros, cost.currency, cost.micros_per_hour) == (200_000, "EUR", 100_000)


def total(owner: str, used: int, **values: Any) -> SessionTotal:
    return SessionTotal.of(record(owner, used, **values), used)


def test_usage_is_by_member_and_in_one_currency() -> None:
    totals = [
        total("ann", HOUR), total("ann", HOUR), total("bob", 3 * HOUR),
        total("bob", HOUR, currency="USD"), total("cy", 5, currency="", rate=0),
    ]  # fmt: skip
    found = {item.member: item for item in sum_up(totals, "EUR")}
    assert list(found) == ["bob", "ann", "cy"]
    assert (found["ann"].sessions, found["ann"].micros) == (2, 200_000)
    assert (found["bob"].used_milliseconds, found["bob"].micros) == (4 * HOUR, 300_000)
    assert found["cy"].message().cost.currency == "EUR"
    (free,) = sum_up([total("cy", 5, currency="", rate=0)], "")
    assert not free.message().HasField("cost")


@pytest.mark.parametrize(
    "values",
    [
        {"cost_session_hour": 0.1},
        {"cost_currency": "EUR", "cost_gpu_hour": -1.0},
        {"cost_currency": "E" * 13},
        {"cost_currency": "E\n"},
        {"sessions_per_member": -1},
        {"session_start_timeout": 0.0},
    ],
)
def test_rates_and_bounds_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GatewayConfig(**values)
