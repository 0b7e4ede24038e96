"""--call and --check: a question to the frontend instead of a build.

Source: docker/buildx util/buildflags/callfunc.go; BuildKit frontend/subrequests.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from offload_client.build.options import check_text
from offload_client.goboolean import parse_boolean
from offload_core.errors import InvalidValueError


@dataclass(frozen=True)
class CallRequest:
    """What is asked, and how the answer is printed."""

    name: str
    """BuildKit's name without "frontend.", for example "lint"."""
    format: str = ""
    """"json", or "" for text."""
    ignore_status: bool = False
    """Exit with 0 also when something was found."""

    @property
    def machine_readable(self) -> bool:
        """The answer is for programs."""
        return self.format == "json"

    @property
    def method(self) -> str:
        """BuildKit's name of the request."""
        return f"frontend.{self.name}"


def parse_call(text: str) -> CallRequest | None:
    """Return the meaning of --call, "NAME[,format=json|text][,ignorestatus=true]"; None to build.

    Raises:
        InvalidValueError: in buildx's words.
    """
    check_text("--call", text)
    try:
        fields = next(csv.reader(io.StringIO(text)), []) if text else []
    except csv.Error as error:
        raise InvalidValueError(f"invalid print value: {text} ({error})") from error
    name, form, ignore = "", "", False
    for field in fields:
        key, mark, value = field.partition("=")
        if not mark:
            if name:
                raise InvalidValueError(f"invalid print value: {text}")
            name = field
        elif key == "format":
            form = value
        elif key == "ignorestatus":
            answer = parse_boolean(value)
            if answer is None:
                raise InvalidValueError(f"invalid ignorestatus print value: {value}")
            ignore = answer
        else:
            raise InvalidValueError(f"invalid print field: {field}")
    if form not in ("", "text", "json"):
        raise InvalidValueError(f'invalid --call format "{form}"; write text or json')
    if name in ("", "build"):
        return None
    return CallRequest(
        "lint" if name == "check" else name, "json" if form == "json" else "", ignore
    )
