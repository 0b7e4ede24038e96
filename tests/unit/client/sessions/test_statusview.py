"""How a session is shown."""

from __future__ import annotations

import pytest

from offload_client.sessions.statusview import length, money, port_text, pretty_lines, size

VIEW = {
    "name": "default",
    "account": "anna",
    "state": "running",
    "idle": True,
    "age_seconds": 250.0,
    "seconds_until_idle": 200.0,
    "gpu": False,
    "helper": "running",
}


def values(view: dict[str, object]) -> dict[str, str]:
    lines = pretty_lines(view)
    assert lines[0] == "Session default"
    pairs = (line.strip().partition(":") for line in lines[1:])
    return {name: text.strip() for name, _, text in pairs}


def test_lines_of_dockers_own_status_come_first() -> None:
    assert [line.strip() for line in pretty_lines(VIEW)[1:6]] == [
        "Account:          anna",
        "State:            Running (Idle)",
        "Session started:  4m10s ago",
        "Time until idle:  3m20s",
        "GPU:              no",
    ]


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({"idle": False, "seconds_until_idle": None}, "State", "Running"),
        ({"idle": False, "seconds_until_idle": None}, "Time until idle", "in use"),
        ({"state": "paused", "idle": False}, "Time until idle", "paused"),
        ({"state": "queued", "age_seconds": None, "idle": False, "seconds_until_idle": None},
         "Session started", "N/A"),
        ({"helper": "reconnecting"}, "State", "Running (Reconnecting)"),
        ({"gpu": True}, "GPU", "yes"),
        ({"context": "docker-offload", "in_use": True}, "Docker context",
         "docker-offload (in use)"),
        ({"bytes_to_session": 1500, "bytes_from_session": 0}, "Bytes", "1.5kB there, 0B back"),
        ({"cost": {"micros": 120_000, "currency": "EUR", "micros_per_hour": 1_500_000}}, "Cost",
         "0.1200 EUR (1.50 EUR per hour)"),
        ({"ports": [{"address": "127.0.0.1", "port": 8081, "container_port": "80/tcp"}]},
         "Ports", "127.0.0.1:8081->80/tcp"),
        ({"directories": [
            {"path": "/a", "state": "same"},
            {"path": "/b", "state": "starting", "entries_here": 9, "entries_there": 4,
             "sent_bytes": 2_000_000},
            {"path": "/c", "state": "ended"},
        ]}, "Directories", ("/a, /b (copying: 4 of 9 files, 2MB there), "
         "/c (not synchronised any more)")),
        ({"warning": "it ends in 5 minutes"}, "WARNING", "it ends in 5 minutes"),
    ],
)  # fmt: skip
def test_news_are_shown(changes: dict[str, object], name: str, text: str) -> None:
    assert values(VIEW | changes)[name] == text


def test_amounts_are_written_as_people_read_them() -> None:
    assert [length(seconds) for seconds in (0.4, 59.9, 60, 3600, 7325)] == [
        "0s", "59s", "1m0s", "1h0m", "2h2m",
    ]  # fmt: skip
    assert length(None) == "N/A"
    counts = (0, 999, 1000, 12_345_678)
    assert [size(count) for count in counts] == ["0B", "999B", "1kB", "12.35MB"]
    assert money(0, "EUR") == "0.00 EUR"
    assert port_text({"address": "::1", "port": 1, "container_port": "2/udp"}) == "[::1]:1->2/udp"
