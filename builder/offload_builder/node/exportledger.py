"""Which builds of one BuildKit have their cache exported, so that nothing is exported twice.

A build of which every step is cached need not be exported when what these steps made went to the
same scope before. It must be when they ran in a build of another scope, in one that may not write,
or in one whose export failed: readers of the scope do not have the results then. BuildKit keeps its
cache when the node dies, so exports that were begun and not done are remembered on disk.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

import structlog

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

MAX_KEYS = 1_000
"""What is older is forgotten, and counts as exported."""

K = TypeVar("K")
V = TypeVar("V")
Name = tuple[str, str]  # scope, entry key


class ExportLedger:
    """Counts for each entry key how often its steps ran, and what of that went to each scope.

    Args:
        path: file for the exports that are still to be done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ran: OrderedDict[str, int] = OrderedDict()
        self._exported: OrderedDict[Name, int] = OrderedDict()
        self._owed: OrderedDict[Name, None] = OrderedDict()
        self._under_way: set[Name] = set()

    def load(self) -> None:
        """Read what an earlier run has left undone."""
        try:
            found = json.loads(self._path.read_bytes())
            self._owed.update(((str(scope), str(key)), None) for scope, key in found)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            log.warning("cache.exports.unknown", path=str(self._path), error=repr(error))

    def ran(self, key: str) -> None:
        """Note that steps of a key ran in a build that worked."""
        self._ran[key] = self._ran.get(key, 0) + 1
        _cut(self._ran, key)

    def begin(self, scope: str, key: str) -> None:
        """Note that an export begins; `done` or `failed` follows, or the node dies."""
        name = (scope, key)
        self._exported[name] = self._ran.get(key, 0)
        _cut(self._exported, name)
        self._under_way.add(name)
        self._owe(name)

    def made(self, scope: str, key: str) -> None:
        """Note that what steps of a key have made until now was exported with their build."""
        name = (scope, key)
        self._exported[name] = self._ran.get(key, 0)
        _cut(self._exported, name)
        self.done(scope, key)

    def done(self, scope: str, key: str) -> None:
        """Note that an export worked."""
        self._under_way.discard((scope, key))
        if (scope, key) in self._owed:
            del self._owed[scope, key]
            self._save()

    def failed(self, scope: str, key: str) -> None:
        """Note that an export did not work, or that it was done and not kept."""
        self._under_way.discard((scope, key))
        self._owe((scope, key))

    def is_exported(self, scope: str, key: str) -> bool:
        """Whether a scope has everything that steps of a key made here, or gets it now."""
        name = (scope, key)
        if name in self._owed and name not in self._under_way:
            return False
        return self._exported.get(name, 0) >= self._ran.get(key, 0)

    def _owe(self, name: Name) -> None:
        if name not in self._owed:
            self._owed[name] = None
            _cut(self._owed, name)
            self._save()

    def _save(self) -> None:
        try:
            replace_small_file(self._path, json.dumps(list(self._owed)).encode())
        except OSError as error:  # an export that is lost with the node is made at the next change
            log.warning("cache.exports.not_noted", path=str(self._path), error=repr(error))


def _cut(table: OrderedDict[K, V], newest: K) -> None:
    table.move_to_end(newest)
    if len(table) > MAX_KEYS:
        table.popitem(last=False)
