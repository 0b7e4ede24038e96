"""What is mounted where, as a process sees it.

Source: proc(5), /proc/PID/mountinfo; the kernel's `seq_escape`, which writes white space,
backslashes and commas of paths as octal numbers.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount.

    Attributes:
        device: number of the file system, as `os.stat` has it.
        root: directory of the file system that is mounted.
        point: where.
        kind: of the file system, as "overlay".
        options: of the file system; those without a value have an empty one.
    """

    device: int
    root: str
    point: str
    kind: str
    options: dict[str, str]


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """Return the mounts that a process sees, in the order of mounting.

    Raises:
        OSError: there is no such process.
    """
    text = Path(f"/proc/{pid}/mountinfo").read_text("utf-8", "surrogateescape")
    # Paths may have what Python takes for the end of a line as well.
    return [_mount(line) for line in text.split("\n") if line]


def _mount(line: str) -> Mount:
    first, _, second = line.partition(" - ")
    fields, kinds = first.split(" "), second.split(" ")
    major, _, minor = fields[2].partition(":")
    options = dict(item.partition("=")[::2] for item in kinds[2].split(","))
    return Mount(
        os.makedev(int(major), int(minor)),
        _plain(fields[3]),
        _plain(fields[4]),
        kinds[0],
        {key: _plain(value) for key, value in options.items()},
    )


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
