"""What a build prints must not be taken for an order to the system that shows its log.

Such systems read orders from the log itself: set an output, hide a text, fold lines. A build prints
what its Dockerfile, its base images and its dependencies want, so everything that is not ours is
changed where it could be an order: a backslash comes before what would begin one. A visible
character, because systems compare texts by the rules of a language, in which characters without a
width do not count (.NET's `String.StartsWith` and `IndexOf`).

Sources: actions/runner ActionCommand.cs (lines end at a carriage return too, `::` after white space
at the begin of a line, `##[` anywhere); Azure Pipelines "Logging commands" (`##vso[`); TeamCity
"Service messages"; GitLab "Custom collapsible sections"; Buildkite "Managing log output" and "Links
and images in log output".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_client.ci.system import BUILDKITE, GENERIC, GITLAB, find_system
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Characters that may not count: all but visible ASCII. Within a line.
_BLANK = rb"[^\x21-\x7e\r\n]*"
_UNSEEN = rb"[^\x20-\x7e\t\r\n]*"
# These begin with what ends a line, of which there are few: a search for "^" looks at every byte.
_COLONS = re.compile(rb"[\r\n]" + _BLANK + rb"(?=:" + _BLANK + rb":)")
_HASHES = re.compile(
    _UNSEEN.join((rb"#", rb"#", rb"(?:[vV]", rb"[sS]", rb"[oO]", rb"|teamcity)?", rb"(?=\[)"))
)
_JSON_HASHES = re.compile(rb"(" + _HASHES.pattern + rb")\[")
_SECTION = re.compile(rb"(section_(?:start|end)):")
_HEADER = re.compile(rb"[\r\n](?:\x1b\[[0-9;]*[A-Za-z]|[ \t])*(?=(?:---|\+\+\+|~~~|\^\^\^)[ \t])")
# Operating system commands and application program commands of terminals: images, links, times.
_TERMINAL = re.compile(rb"\x1b(?=[\]_P^])")


def guard_for(system: str) -> Callable[[bytes], bytes]:
    """Return what makes whole lines of foreign text harmless in the log of a system.

    Args:
        system: as `find_system` says; "" for none, where nothing is changed.
    """
    if not system:
        return _unchanged
    return {GITLAB: _for_gitlab, BUILDKITE: _for_buildkite}.get(system, _commands)


def guard_json(data: bytes) -> bytes:
    """Return JSON of the same meaning that has no order within a line."""
    return _JSON_HASHES.sub(rb"\1\\u005b", data) if b"#" in data else data


def guard_foreign(environment: Mapping[str, str], text: str) -> str:
    """Return lines of text that are harmless where a command with this environment runs."""
    try:
        system = find_system(environment)
    except UsageError:
        system = GENERIC
    if not system:
        return text
    return guard_for(system)(text.encode("utf-8", "replace")).decode("utf-8", "replace")


def _unchanged(data: bytes) -> bytes:
    return data


def _commands(data: bytes) -> bytes:
    if b":" in data:
        data = _at_line_starts(_COLONS, data)
    return _HASHES.sub(rb"\g<0>\\", data) if b"#" in data else data


def _at_line_starts(pattern: re.Pattern[bytes], data: bytes) -> bytes:
    return pattern.sub(rb"\g<0>\\", b"\n" + data)[1:]


def _for_gitlab(data: bytes) -> bytes:
    data = _commands(data)
    return _SECTION.sub(rb"\1\\:", data) if b"section_" in data else data


def _for_buildkite(data: bytes) -> bytes:
    data = _at_line_starts(_HEADER, _commands(data))
    return _TERMINAL.sub("\N{SYMBOL FOR ESCAPE}".encode(), data) if b"\x1b" in data else data
