"""Whether one BuildKit has by itself all that an import could give it.

BuildKit reads an import at every build, with three requests one after the other, before the first
step: a fifth of the time of a build in which all is cached. A BuildKit that made all contributions
of an import itself finds nothing in it. That holds as long as nothing was imported before, as
layers that were not fetched yet can be read only with their import, and nothing was removed.

What is wrong here costs time, never a wrong result: steps are built again, or an import is read
for nothing. So what is kept on disk need not survive a loss of power.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import structlog

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from offload_builder.buildkit.client import DiskRecord

log = structlog.get_logger(__name__)

FILE_NAME = "own-results.json"
MAX_CONTRIBUTIONS = 4096
_VERSION = 1
_PASSING = "local source for "
"""How BuildKit describes its view of a local source for one build (source/local/source.go)."""


class OwnResults:
    """What a BuildKit's state holds, kept beside it, so that both go together.

    Args:
        root: directory of BuildKit's state. A state without our file, of an earlier version or
            written by somebody else, counts as one that may have imported.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE_NAME
        self._contributions: dict[str, None] = {}
        self._records: frozenset[str] = frozenset()
        self._whole = not any(root.glob("runc-*"))
        self._looked = True
        self._load()

    @property
    def look_due(self) -> bool:
        """Whether builds may have changed what there is since the last `look`."""
        return self._whole and not self._looked

    def hold_all(self, contributions: Iterable[str]) -> bool:
        """Return whether an import of these contributions would give nothing new."""
        return self._whole and self._contributions.keys() >= set(contributions)

    def add(self, contribution: str) -> None:
        """Note that this BuildKit has exported a contribution."""
        if not self._whole:
            return
        self._contributions[contribution] = None
        while len(self._contributions) > MAX_CONTRIBUTIONS:
            del self._contributions[next(iter(self._contributions))]
        self._save()

    def imported(self) -> None:
        """Note that BuildKit is about to read an import with results of others."""
        self._end("import")

    def built(self) -> None:
        """Note that a build has ended, so that what it made is there to be missed later."""
        self._looked = False

    def look(self, records: Iterable[DiskRecord]) -> None:
        """Compare what BuildKit keeps with what it kept before.

        Args:
            records: all of them.
        """
        self._looked = True
        found = frozenset(record.id for record in records if _is_result(record))
        if self._records - found:
            self._end("garbage collection")
        elif self._whole and found != self._records:
            self._records = found
            self._save()

    def _end(self, reason: str) -> None:
        if not self._whole:
            return
        self._whole = False
        self._contributions.clear()
        self._records = frozenset()
        self._save()
        log.info("buildkit.results.shared", path=str(self._path), reason=reason)

    def _load(self) -> None:
        try:
            raw = json.loads(self._path.read_text("utf-8"))
            if raw["version"] != _VERSION:
                return
            self._contributions = dict.fromkeys(map(str, raw["contributions"]))
            self._records = frozenset(map(str, raw["records"]))
            self._whole = raw["whole"] is True
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._whole = False
            log.warning("buildkit.results.unreadable", path=str(self._path), cause=str(error))

    def _save(self) -> None:
        document = {
            "version": _VERSION,
            "whole": self._whole,
            "contributions": list(self._contributions),
            "records": sorted(self._records),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_small_file(self._path, json.dumps(document).encode())
        except OSError as error:
            self._whole = False
            # Without a file the state counts as one that may have imported.
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            log.warning("buildkit.results.not_kept", path=str(self._path), cause=str(error))


def _is_result(record: DiskRecord) -> bool:
    # The others come and go with builds.
    passing = record.mutable or record.description.startswith(_PASSING)
    return record.kind == "regular" and not passing
