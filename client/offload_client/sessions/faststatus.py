"""`offload status --sessions`: what the helpers of this machine's sessions say, at once.

A prompt or an editor asks every few seconds, so nothing is imported for it that takes long: no
parser of options, no gRPC. What it is asked for in other words is left to the command itself.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from offload_client.sessions.control import HelperAwayError, ask_helper
from offload_client.sessions.records import (
    helper_socket,
    list_records,
    noted_end,
    session_directory,
)
from offload_client.sessions.statusview import pretty_lines, view_of_helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.invocation import Invocation
    from offload_client.sessions.records import SessionRecord

ASK_SECONDS = 2.0
WATCH_SECONDS = 1.0
MAX_CONFIG_BYTES = 4 << 20
_FORMS = {"--format=json": "json", "--format=pretty": "pretty", "-fjson": "json",
          "-fpretty": "pretty", "-f=json": "json"}  # fmt: skip


def fast_status(arguments: Sequence[str]) -> int | None:
    """Do a command line of `offload status` if it is about sessions only.

    Returns:
        The exit code; None when the command itself has to do it.
    """
    if not {"-s", "--sessions", "-w", "--watch"}.intersection(arguments):
        return None
    output, names, watch = "pretty", [], False
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("-f", "--format") and words and words[0] in ("json", "pretty"):
            output = words.pop(0)
        elif word in _FORMS:
            output = _FORMS[word]
        elif word in ("-w", "--watch"):
            watch = True
        elif word in ("-s", "--sessions"):
            continue
        elif word.startswith("-"):
            return None
        else:
            names.append(word)
    if len(names) > 1:
        return None
    from offload_client.invocation import Invocation
    from offload_core.errors import OffloadError

    invocation = Invocation.of_process(())
    try:
        return show_sessions(invocation, names[0] if names else None, output, watch=watch)
    except OffloadError as error:
        invocation.err(f"ERROR: {error.message}")
        if error.hint:
            invocation.err(error.hint)
        return error.exit_code
    except BrokenPipeError:
        return 141


def show_sessions(
    invocation: Invocation, name: str | None, output: str, *, watch: bool = False
) -> int:
    """Print the state of this machine's sessions; blocks.

    Args:
        invocation: the command.
        name: of one session; None for all.
        output: "pretty" or "json".
        watch: again every second, until an interrupt.

    Returns:
        The exit code.

    Raises:
        NotFoundError: there is no such session here.
        InvalidValueError: the name cannot be one of a session.
    """
    if not watch:
        invocation.out(_text(session_views(invocation, name), output))
        return 0
    terminal = output == "pretty" and os.isatty(invocation.stdout.fileno())
    said = ""
    try:
        while True:
            views = session_views(invocation, name)
            text = _text(views, output, lines=True)
            if terminal:
                # From the top, so that what was there is painted over.
                invocation.out(f"\x1b[H\x1b[J{text}")
            elif _steady(views) != said:
                said = _steady(views)
                invocation.out(text)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


def _steady(views: Sequence[dict[str, Any]]) -> str:
    """Return what of some views does not change with every second."""
    return json.dumps(
        [
            {
                key: value
                for key, value in view.items()
                if not key.startswith("seconds_") and key not in ("age_seconds", "used_seconds")
            }
            for view in views
        ]
    )


def _text(views: Sequence[dict[str, Any]], output: str, *, lines: bool = False) -> str:
    if output == "json":
        return json.dumps(views, indent=None if lines else 2)
    if not views:
        return "No session is in use on this machine; start one with: offload start"
    return "\n\n".join("\n".join(pretty_lines(view)) for view in views)


def session_views(
    invocation: Invocation,
    name: str | None = None,
    *,
    in_use: bool = False,
    timeout: float = ASK_SECONDS,
) -> list[dict[str, Any]]:
    """Return what the helpers of this machine's sessions say; blocks.

    Args:
        invocation: the command.
        name: of one session; None for all.
        in_use: only the one that docker uses.
        timeout: seconds of silence of each.

    Raises:
        NotFoundError: there is no such session here.
        InvalidValueError: the name cannot be one of a session.
    """
    records = list_records(invocation)
    if name is not None:
        records = [record for record in records if name in (record.name, record.session_id)]
        if not records:
            from offload_core.errors import NotFoundError

            session_directory(invocation, name)
            raise NotFoundError(
                f'there is no session "{name}" on this machine', hint="list them with: offload ps"
            )
    current = current_context(invocation)
    if in_use:
        records = [record for record in records if record.context and record.context == current]
    return [_view(invocation, record, current, timeout) for record in records]


def _view(
    invocation: Invocation, record: SessionRecord, current: str, timeout: float
) -> dict[str, Any]:
    directory = session_directory(invocation, record.name)
    try:
        answer = ask_helper(helper_socket(directory), "status", timeout=timeout)
    except HelperAwayError:
        answer = None
    if answer is None and (reason := noted_end(directory)):
        answer = {"state": "ended", "reason": reason}
        return view_of_helper(record, answer, time.time(), current) | {"helper": "not running"}
    return view_of_helper(record, answer, time.time(), current)


def current_context(invocation: Invocation) -> str:
    """Return the docker context in use; empty for docker's default one, or an unreadable file."""
    environment = invocation.environment
    if environment.get("DOCKER_HOST"):
        return ""
    if named := environment.get("DOCKER_CONTEXT"):
        return named
    folder = environment.get("DOCKER_CONFIG") or f"{invocation.home()}/.docker"
    try:
        with open(f"{folder}/config.json", "rb") as file:  # noqa: PTH123 - as small as it gets
            found = json.loads(file.read(MAX_CONFIG_BYTES)).get("currentContext")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""
