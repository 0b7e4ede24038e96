"""Finds the step of a build that a process is, by what both say that they run.

BuildKit tells nowhere which step a container belongs to. Steps have the text of their instruction
for a name, with variables filled in and long here-documents cut; containers have a command line.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEAD = re.compile(r"^(?:\[[^\]]*\] )?(?:RUN\s+)?(?:--\S+\s+)*")
_WORD = re.compile(r"[A-Za-z0-9]+")
SURE, LIKELY, ANY = 0.999, 0.3, 0.0
"""How like a step has to be: the same words, not the same by chance, or as it may be."""
_TIE = 0.001


def matching_steps(
    arguments: Sequence[str], names: Mapping[str, str], *, least: float = LIKELY
) -> list[str]:
    """Return the steps that a process may be, those that fit best only.

    Args:
        arguments: of the process.
        names: of the steps in question, by digest.
        least: so like has a step to be, else none is returned; with `ANY` all, if none is likely.
    """
    if not names:
        return []
    wanted = _words(_command(arguments))
    scores = {digest: _likeness(wanted, _words(_HEAD.sub("", names[digest]))) for digest in names}
    best = max(scores.values())
    if least == ANY and best < LIKELY:
        return list(names)
    if best < least:
        return []
    return [digest for digest, score in scores.items() if score >= best - _TIE]


def _command(arguments: Sequence[str]) -> str:
    if "-c" in arguments:
        last = len(arguments) - 1 - list(reversed(arguments)).index("-c")
        arguments = arguments[last + 1 :]
    return " ".join(arguments)


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text))


def _likeness(one: Counter[str], other: Counter[str]) -> float:
    size = one.total() + other.total()
    return 2 * (one & other).total() / size if size else 0.0
