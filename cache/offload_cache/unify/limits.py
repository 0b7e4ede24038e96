"""How much one import may hold, and what is left out when there is more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from offload_cache.unify.render import Rendered, render
from offload_cache.unify.union import Union, keep_newest, unite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from offload_cache.unify.records import Part

N = TypeVar("N")

_VARIANTS = 1.3  # records of one build differ a little in their alternatives before they are united
_TRIES_PAST_FULL = 8
_SHRINK = 0.85


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an import.

    Attributes:
        max_records: each thousand costs every build about 20 ms and BuildKit 12 MB.
        max_document_bytes: of the records and of the manifest each; BuildKit refuses more than
            1 MiB and says so only in its log.
    """

    max_records: int = 1_000
    max_document_bytes: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Unified(Generic[N]):
    """One import of many contributions.

    Attributes:
        rendered: the documents.
        used: names of the contributions in it, in order of preference.
        missing: layers that would have been of use but are not to be had.
    """

    rendered: Rendered
    used: tuple[N, ...]
    missing: frozenset[str]


class Choice(Generic[N]):
    """Picks contributions, the most preferred first, until an import is full.

    Args:
        limits: bounds of the import, the usual ones when not given.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.chosen: list[tuple[N, Part]] = []
        self._max_records = int(self.limits.max_records * _VARIANTS)
        self._names: set[bytes] = set()
        self._refused = 0

    @property
    def full(self) -> bool:
        """Whether it is not worth to go on."""
        return self._refused >= _TRIES_PAST_FULL

    def add(self, name: N, part: Part) -> None:
        """Take a contribution unless it does not fit beside those before it; the first one fits."""
        more = part.records.keys() - self._names
        if self.chosen and len(self._names) + len(more) > self._max_records:
            self._refused += 1
            return
        self._names |= more
        self.chosen.append((name, part))

    def unify(self, *, salt: str, available: Callable[[str], bool]) -> Unified[N]:
        """Unite what was chosen.

        What still does not fit is left out whole, the least preferred first; when a single
        contribution is too large, its oldest leaves.

        Args:
            salt: see `salt_digest`.
            available: whether a layer can be had, by digest.
        """
        chosen = list(self.chosen)
        while True:
            union = unite((part for _, part in chosen), available)
            last = len(chosen) <= 1
            if last and len(union.records) > self.limits.max_records:
                union = keep_newest(union, self.limits.max_records)
            if len(union.records) <= self.limits.max_records:
                rendered = _fit(union, salt, self.limits, last=last)
                if rendered is not None:
                    names = tuple(name for name, _ in chosen)
                    return Unified(rendered, names, union.missing)
            del chosen[max(1, int(len(chosen) * _SHRINK)) :]


def unify(
    parts: Iterable[tuple[N, Part]],
    *,
    salt: str,
    available: Callable[[str], bool],
    limits: Limits | None = None,
) -> Unified[N]:
    """Unite contributions into one import within its bounds; see `Choice`.

    Args:
        parts: names and contributions, the most preferred first; read no further than needed.
        salt: see `salt_digest`.
        available: whether a layer can be had, by digest.
        limits: bounds, the usual ones when not given.
    """
    choice: Choice[N] = Choice(limits)
    for name, part in parts:
        choice.add(name, part)
        if choice.full:
            break
    return choice.unify(salt=salt, available=available)


def _fit(union: Union, salt: str, bounds: Limits, *, last: bool) -> Rendered | None:
    while True:
        for short in (False, True):
            rendered = render(union, salt, short=short)
            size = max(len(rendered.config), rendered.manifest_bytes)
            if size <= bounds.max_document_bytes:
                return rendered
        if not last:
            return None
        union = keep_newest(union, int(len(union.records) * _SHRINK))
