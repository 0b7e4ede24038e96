"""Records of contributions that were read lately."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from offload_cache.contributions import Contribution
from offload_cache.unify import read_part

if TYPE_CHECKING:
    from offload_cache.unify import Part

_MAX_RECORDS = 40_000  # about 30 MB


class PartCache:
    """Parsed records by scope and contribution, bounded by their number. Safe for any thread."""

    def __init__(self, max_records: int = _MAX_RECORDS) -> None:
        self._max_records = max_records
        self._parts: OrderedDict[tuple[str, str], Part] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def get(self, name: tuple[str, str]) -> Part | None:
        """Return what was read before."""
        with self._lock:
            part = self._parts.get(name)
            if part is not None:
                self._parts.move_to_end(name)
            return part

    def read(self, name: tuple[str, str], document: bytes) -> Part:
        """Read a contribution's document.

        Raises:
            UsageError: it is damaged.
        """
        contribution = Contribution.from_bytes(document)
        part = read_part(contribution.records, contribution.layers)
        with self._lock:
            if (before := self._parts.pop(name, None)) is not None:
                self._count -= len(before.records)
            self._parts[name] = part
            self._count += len(part.records)
            while self._count > self._max_records and len(self._parts) > 1:
                _, gone = self._parts.popitem(last=False)
                self._count -= len(gone.records)
            return part
