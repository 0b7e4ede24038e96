"""Orders to the systems that show our log: fold lines, mark a line of a file.

Sources: GitHub "Workflow commands for GitHub Actions" and actions/toolkit's escaping; GitLab
"Custom collapsible sections"; Buildkite "Managing log output". CircleCI and Jenkins have none.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from offload_client.ci.system import BUILDKITE, GITHUB, GITLAB
from offload_client.progress.cells import printable

MAX_ANNOTATIONS = 10
"""Of one kind in one step; GitHub leaves out what is more."""
_MAX_MESSAGE_CHARACTERS = 4000
_MAX_TITLE_CHARACTERS = 200


@dataclass(frozen=True)
class Annotation:
    """A sentence about a line of a file.

    Attributes:
        level: "warning" or "error".
        message: may have several lines.
        title: one line.
        file: path from the top of the repository; empty when it is not known.
        line: from 1; 0 when it is not known.
        end_line: last line; 0 for the same.
    """

    level: str
    message: str
    title: str = ""
    file: str = ""
    line: int = 0
    end_line: int = 0


class Orders:
    """The orders that one system knows; where it knows none, the texts are empty."""

    def __init__(self, system: str) -> None:
        """Speak to a system, as `find_system` says."""
        self._system = system
        self._sections = 0
        self._open = ""

    @property
    def folds(self) -> bool:
        """The system folds lines."""
        return self._system in (GITHUB, GITLAB, BUILDKITE)

    def fold(self, number: int, title: str, now: float) -> bytes:
        """Return what begins the output of a step, which is shown folded.

        Args:
            number: of the step.
            title: of the step, whose line stands above; Buildkite has nothing above a fold.
            now: seconds since 1970.
        """
        if self._system == GITHUB:
            return f"::group::#{number} output\n".encode()
        if self._system == BUILDKITE:
            title = _short(printable(title), _MAX_TITLE_CHARACTERS)
            return f"--- #{number} {title}\n".encode("utf-8", "replace")
        if self._system == GITLAB:
            self._sections += 1
            self._open = f"offload_{secrets.token_hex(4)}_{self._sections}"
            start = f"section_start:{now:.0f}:{self._open}[collapsed=true]"
            return f"\x1b[0K{start}\r\x1b[0K#{number} output\n".encode()
        return b""

    def unfold(self, now: float) -> bytes:
        """Return what ends them; Buildkite ends them with the next."""
        if self._system == GITHUB:
            return b"::endgroup::\n"
        if self._system == GITLAB:
            return f"\x1b[0Ksection_end:{now:.0f}:{self._open}\r\x1b[0K\n".encode()
        return b""

    def show(self, title: str) -> bytes:
        """Return what shows the lines that follow, where all stands in folds."""
        return f"+++ {title}\n".encode() if self._system == BUILDKITE else b""

    def open_last(self) -> bytes:
        """Return what opens the lines of the last fold, because a step has failed in them."""
        return b"^^^ +++\n" if self._system == BUILDKITE else b""

    def annotate(self, annotation: Annotation) -> bytes:
        """Return what marks a line of a file; empty where the system cannot."""
        if self._system != GITHUB:
            return b""
        properties = []
        if annotation.file:
            properties.append(f"file={_property(annotation.file)}")
            if annotation.line:
                properties.append(f"line={annotation.line}")
            if annotation.end_line > annotation.line:
                properties.append(f"endLine={annotation.end_line}")
        if annotation.title:
            title = _short(printable(annotation.title), _MAX_TITLE_CHARACTERS)
            properties.append(f"title={_property(title)}")
        lines = "\n".join(map(printable, annotation.message.splitlines()))
        message = _data(_short(lines, _MAX_MESSAGE_CHARACTERS))
        space = " " if properties else ""
        order = f"::{annotation.level}{space}{','.join(properties)}::{message}\n"
        return order.encode("utf-8", "replace")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
