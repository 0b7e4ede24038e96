"""The help of `offload-build` as it was rendered when this version was made.

Building the parser and rendering take three times as long as the interpreter's own start. The files
are written by deploy/generate_docs.py, which also checks that they say what the parser says.
"""

from __future__ import annotations

import os
import sys

WIDTHS = (80, 100)
"""Columns for which there is a file; the widest is for all that is wider."""


def print_ready_help() -> bool:
    """Print the help for the width of the terminal; False when it has to be rendered."""
    columns = _columns()
    if columns > WIDTHS[-1]:
        columns = WIDTHS[-1]
    if columns not in WIDTHS:
        return False
    try:
        with open(help_file(columns), "rb") as file:  # noqa: PTH123 - pathlib is an import
            data = file.read()
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        # Whoever renders it meets the same fault and reports it.
        return False
    return True


def help_file(columns: int) -> str:
    """Return the path of the file for a width."""
    return f"{__file__.rpartition('/')[0]}/help/offload-build.{columns}.txt"


def _columns() -> int:
    """Return the terminal's width as shutil.get_terminal_size does, which click asks."""
    try:
        columns = int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        columns = 0
    if columns > 0:
        return columns
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or WIDTHS[0]  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return WIDTHS[0]
