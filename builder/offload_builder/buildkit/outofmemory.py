"""Which build steps the kernel ended for lack of memory, with their limit and peak.

A step's control group goes away with it, so the program in runc's place (`runcwrapper`) looks
into it before BuildKit has it deleted, and leaves a line for steps of which a process was killed:
limit, peak, and the step's command as the JSON list of its specification.
Sources: the kernel's admin-guide/cgroup-v1/memory (memory.oom_control) and cgroup-v2
(memory.events); runc's libcontainer/cgroups (an absolute path is one below the hierarchy's root, in
both versions) and BuildKit's executor/oci for where the group lies.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.units import format_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDER = "out-of-memory"
KEPT_SECONDS = 900.0
"""Longer than BuildKit needs to report a failed step."""
_UNLIMITED_BYTES = 1 << 60
_FULL = 0.9
"""A step whose peak is below this share of its own limit was not ended for that."""
_PROCESS = re.compile(r'process "(.*?)" did not complete successfully', re.DOTALL)
_PLAIN = re.compile(r"[^A-Za-z0-9]+")

SHELL = r"""# What a step's control group says of memory is gone when the step is deleted.
if [ "$verb" = delete ] && [ -d {folder} ]; then
    place=
    # Where BuildKit puts it; else, below what a build said with --cgroup-parent, as the step says.
    for own in /buildkit/"$word" ''; do
        [ -n "$own" ] || [ -n "$place" ] || own=$(LC_ALL=C sed -n \
            's/.*"cgroupsPath":"\(\/[^"]*\)".*/\1/p' \
            {root}/runc-*/executor/"$word"/config.json 2>/dev/null)
        # Without a name it would be the group of the whole machine.
        [ -z "$own" ] || for folder in /sys/fs/cgroup/memory"$own" /sys/fs/cgroup"$own"; do
            [ -n "$place" ] || [ ! -r "$folder/memory.stat" ] || place=$folder
        done
    done
    killed=0
    if [ -r "$place/memory.oom_control" ]; then
        events=oom_control limit=limit_in_bytes peak=max_usage_in_bytes
    else
        events=events limit=max peak=peak
    fi
    [ ! -r "$place/memory.$events" ] || while read -r name count; do
        [ "$name" != oom_kill ] || killed=$count
    done <"$place/memory.$events"
    if [ "$killed" -gt 0 ]; then
        read -r limit <"$place/memory.$limit" || limit=
        [ -r "$place/memory.$peak" ] && read -r peak <"$place/memory.$peak" || peak=
        command=$(LC_ALL=C sed -n 's/.*"args":\(\[.*\]\),"env":\[.*/\1/p' \
            {root}/runc-*/executor/"$word"/config.json 2>/dev/null)
        printf '%s %s %s\n' "${{limit:-0}}" "${{peak:-0}}" "$command" >{folder}/"$word"
    fi
fi
"""
"""For `write_runc_wrapper`; `$verb` is runc's command, `$word` the last argument: a container."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A step of which the kernel ended a process.

    Attributes:
        limit_bytes: of the step; 0 when it had none, so the machine ran out of memory.
        peak_bytes: the most that it used; 0 when the kernel does not tell.
    """

    limit_bytes: int
    peak_bytes: int

    def within(self, build_bytes: int) -> bool:
        """Return whether the bound of its build, rather than its own, was what it met.

        Args:
            build_bytes: of the build, if its steps together wanted more; else 0.
        """
        if not build_bytes or not self.limit_bytes or self.limit_bytes >= build_bytes:
            return bool(build_bytes)
        return 0 < self.peak_bytes < self.limit_bytes * _FULL

    def describe_build(self, build_bytes: int) -> str:
        """Return a sentence for people where the bound of the build was met."""
        return (
            "The build ran out of memory: the kernel ended a process of this step, as the steps of "
            f"the build together wanted more than its limit of {format_memory(build_bytes)}. Let "
            "them use less or run one after the other, or ask who runs the node for more "
            "(build_memory)."
        )

    def describe(self) -> str:
        """Return a sentence for people."""
        peak = f" (its peak was {format_memory(self.peak_bytes)})" if self.peak_bytes else ""
        if self.limit_bytes:
            return (
                "The step ran out of memory: the kernel ended a process of it that wanted more "
                f"than its limit of {format_memory(self.limit_bytes)}{peak}. Give it more with "
                "--resource memory=SIZE, as far as the node permits, or let it use less."
            )
        return (
            f"The node ran out of memory, and the kernel ended a process of this step{peak}. Build "
            "again, let the step use less, or ask who runs the node for more memory or fewer slots."
        )


def find_out_of_memory(root: Path, message: str, since: float) -> OutOfMemory | None:
    """Return what is known of the step that a failure tells of, or None; reads files.

    Args:
        root: directory of the daemon.
        message: of the failure; BuildKit names the command in it.
        since: when the build began, in seconds since 1970; older steps are not of it.
    """
    found: OutOfMemory | None = None
    with contextlib.suppress(OSError):
        for path in (root / FOLDER).iterdir():
            with contextlib.suppress(OSError, ValueError):
                written = path.stat().st_mtime
                if written >= since:
                    limit, peak, command = path.read_text("utf-8", "replace").split(" ", 2)
                    if is_step_of(message, _words(command)):
                        found = OutOfMemory(_bytes(limit), _bytes(peak))
                elif written < time.time() - KEPT_SECONDS:
                    path.unlink()
    return found


def is_step_of(message: str, arguments: Sequence[str]) -> bool:
    """Return whether a failure tells of a process, going by its arguments."""
    named = _PROCESS.search(message)
    wanted = _letters(named[1]) if named is not None else ""
    return _letters(" ".join(arguments)) == wanted


def _words(command: str) -> list[str]:
    try:
        words = json.loads(command)
    except ValueError:
        return []
    return [str(word) for word in words] if isinstance(words, list) else []


def _letters(text: str) -> str:
    # BuildKit quotes as Go does; the letters are the same in every form, but for escapes.
    return _PLAIN.sub("", re.sub(r"\\(?:[abfnrtv]|x..|u....|U........)", "", text))


def _bytes(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    return number if number < _UNLIMITED_BYTES else 0
