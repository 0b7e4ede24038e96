"""Which sessions are open, on disk: what a start finds there was lost with the last process."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import structlog

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What is kept of one open session.

    Attributes:
        session_id: the session.
        project_id: of it.
        owner: whose it is.
        engine_id: of its engine; empty while that is made.
        used_seconds: that count, when the record was written.
    """

    session_id: str
    project_id: str
    owner: str
    engine_id: str = ""
    used_seconds: float = 0.0


class SessionRecords:
    """One small file for each open session; blocks for as long as a small file takes.

    Args:
        folder: made when it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: SessionRecord) -> None:
        """Write or replace a record.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{record.session_id}{_SUFFIX}"
        replace_small_file(path, json.dumps(asdict(record)).encode(), durable=True)

    def remove(self, session_id: str) -> None:
        """Remove a record; nothing happens when there is none."""
        with contextlib.suppress(OSError):
            (self._folder / f"{session_id}{_SUFFIX}").unlink(missing_ok=True)

    def take_all(self) -> list[SessionRecord]:
        """Return all records and remove them; those that cannot be read are only removed."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self._folder.iterdir()):
                try:
                    found.append(SessionRecord(**json.loads(path.read_bytes())))
                except (OSError, ValueError, TypeError) as error:
                    if path.suffix == _SUFFIX:
                        log.warning("session.record.broken", path=str(path), cause=str(error))
                with contextlib.suppress(OSError):
                    path.unlink()
        return found
