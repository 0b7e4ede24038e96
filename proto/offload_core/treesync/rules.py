"""Which paths of a directory are synchronised."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from offload_core.patterns import PatternMatcher
from offload_core.treesync.entries import MAX_PATH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

TEMPORARY = ".offload-sync-"
"""Names of ours begin so; nobody else's files are called so."""
_KEPT_STATES = 50_000


class Rules:
    """Ignore patterns, and the one file that is meant; for one thread at a time."""

    def __init__(self, patterns: Iterable[str] = (), only: str = "") -> None:
        """Compile patterns.

        Args:
            patterns: in the form that the ignore file reader gives.
            only: name of the only file; empty for all of the directory.

        Raises:
            ContextError: a pattern is malformed.
        """
        patterns = list(patterns)
        self._matcher = PatternMatcher(patterns) if patterns else None
        self._only = only
        self._states: dict[str, tuple[bool, int]] = {"": (False, 0)}

    def wanted(self, path: str, *, is_directory: bool) -> bool:
        """Return whether a path is synchronised.

        A directory that is ignored counts as wanted while an exception may be below it.

        Raises:
            ContextError: a pattern has a regular expression that Go refuses.
        """
        if path.rpartition("/")[2].startswith(TEMPORARY):
            return False
        if self._only:
            return path == self._only
        if len(path) > MAX_PATH_BYTES // 4 and len(os.fsencode(path)) > MAX_PATH_BYTES:
            return False
        if self._matcher is None:
            return True
        ignored, _ = self._judge(path)
        return not ignored or (is_directory and not self._matcher.prunable(path, matched=True))

    def _judge(self, path: str) -> tuple[bool, int]:
        known = self._states.get(path)
        if known is not None:
            return known
        assert self._matcher is not None  # noqa: S101 - asked by `wanted` only
        if len(self._states) > _KEPT_STATES:
            self._states = {"": (False, 0)}
        state = 0
        at = 0
        verdict = False
        while at >= 0:
            at = path.find("/", at + 1)
            part = path if at < 0 else path[:at]
            known = self._states.get(part)
            if known is None:
                known = self._states[part] = self._matcher.match_child(part, state)
            verdict, state = known
        return verdict, state
