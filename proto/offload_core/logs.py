"""structlog set-up of the services: JSON on a pipe, readable on a terminal, never a secret."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

from offload_core.redaction import redact_values

if TYPE_CHECKING:
    from collections.abc import MutableMapping


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask secrets by the name of their key and by their form; a structlog processor."""
    redact_values(event)
    return event


def configure_logs(level: str = "info", *, force_json: bool = False) -> None:
    """Send events at or above `level` to standard error."""
    number = getattr(logging, level.upper(), logging.INFO)
    readable = sys.stderr.isatty() and not force_json
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=True)
        if readable
        else structlog.processors.JSONRenderer(serializer=_dumps)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Exceptions become text before redaction, so that their messages are masked as well.
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _dumps(value: Any, **_options: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
