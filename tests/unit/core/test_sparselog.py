"""Log lines that others can cause at will."""

from __future__ import annotations

import structlog
from structlog.testing import capture_logs

from offload_core.sparselog import PER_MINUTE, SparseLog


def test_an_event_is_written_so_often_in_a_minute_and_others_beside_it() -> None:
    now = 0.0
    log = SparseLog(structlog.get_logger(), lambda: now)
    with capture_logs() as lines:
        for number in range(PER_MINUTE + 5):
            log.warning("refused", number=number)
        log.info("brought", image="a")
        now = 61.0
        log.warning("refused", number=100)
        now = 122.0
        log.error("refused", number=200)
    assert [line["number"] for line in lines if line["event"] == "refused"] == [
        *range(PER_MINUTE), 100, 200,
    ]  # fmt: skip
    assert lines[PER_MINUTE] == {"event": "brought", "image": "a", "log_level": "info"}
    assert [line.get("left_out") for line in lines[-2:]] == [5, None]
