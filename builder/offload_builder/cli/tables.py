"""Lists on standard output: aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

F = TypeVar("F", bound="Callable[..., Any]")


def format_option(function: F) -> F:
    """Add --format."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Form of the output.",
    )(function)


def print_record(record: Mapping[str, object]) -> None:
    """Print one record as a JSON object."""
    print(json.dumps(dict(record), default=_json, indent=2))


def print_records(
    records: Sequence[Mapping[str, object]], output_format: str, columns: Sequence[str]
) -> None:
    """Print records as a JSON array with all fields, or as a table with some of them."""
    if output_format == "json":
        print(json.dumps([dict(record) for record in records], default=_json, indent=2))
        return
    rows = [[column.upper().replace("_", " ") for column in columns]]
    rows += [[_text(record[column]) for column in columns] for record in records]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("   ".join(cells).rstrip())


def _json(value: object) -> str:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "*"
    return str(value)
