"""Values of flags that say how the RUN steps of a build run, with docker's meanings.

Sources: docker/buildx build/utils.go, docker/go-units (sizes and ulimits), and the CSV rules of
spf13/pflag's StringSlice.
"""

from __future__ import annotations

import csv
import io
import ipaddress
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from offload_client.build.stepoptions import NETWORK_MODES, Resources
from offload_core.errors import InvalidValueError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST_GATEWAY = "host-gateway"
ULIMITS = frozenset((
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc",
    "rss", "rtprio", "rttime", "sigpending", "stack",
))  # fmt: skip
_SIZE = re.compile(
    r"(?P<number>\d+\.?\d*|\.\d+) ?(?P<unit>[bkmgtp]?)(?P<rest>(?:i?b)?)", re.IGNORECASE
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_LARGEST = (1 << 63) - 1
"""Of 64 bits with a sign, as Go and the kernel count."""
_POWERS = "bkmgtp"


def parse_hosts(values: Sequence[str]) -> list[str]:
    """Return --add-host values as "NAME=ADDRESS".

    A value is NAME:ADDRESS or NAME=ADDRESS, an IPv6 address may stand in brackets, and several
    values may be joined by commas.

    Raises:
        InvalidValueError: with the value.
    """
    found = []
    for text in (part for value in values for part in _comma_separated("--add-host", value)):
        name, mark, address = text.partition("=")
        if not mark:
            name, mark, address = text.partition(":")
        if not (name and address) or not name.isprintable() or "=" in address:
            raise InvalidValueError(f"invalid host {text}")
        if address == HOST_GATEWAY:
            raise InvalidValueError(
                f"--add-host {text}: {HOST_GATEWAY} is not known on the builder nodes; "
                "give the address itself"
            )
        for one in address.split(","):
            bare = one[1:-1] if len(one) > 2 and one[0] == "[" and one[-1] == "]" else one
            try:
                ipaddress.ip_address(bare)
            except ValueError:
                raise InvalidValueError(f"invalid host {text}") from None
            found.append(f"{name}={bare}")
    return found


def _comma_separated(flag: str, value: str) -> list[str]:
    if not value:
        return []
    try:
        return next(csv.reader(io.StringIO(value)), [])
    except csv.Error as error:
        raise InvalidValueError(f'invalid {flag} "{value}": {error}') from error


def parse_network(text: str) -> str:
    """Return the mode of --network; "" for the default.

    Raises:
        InvalidValueError: BuildKit has no such mode.
    """
    if text not in NETWORK_MODES:
        raise InvalidValueError(
            f'network mode "{text}" not supported by buildkit; write default, none or host'
        )
    return "" if text == "default" else text


def parse_bytes(flag: str, text: str) -> int:
    """Return the bytes of a size as docker reads them: "64m" and "64MiB" are powers of 1024.

    Raises:
        UsageError: not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = match["unit"].lower() if match else ""
    if match is None or (match["rest"] and unit in ("", "b")):
        raise UsageError(f'invalid argument "{text}" for "{flag}" flag: invalid size')
    size = float(match["number"]) * 1024 ** _POWERS.index(unit or "b")
    if size > _LARGEST:
        raise UsageError(f'invalid argument "{text[:40]}" for "{flag}" flag: it is too large')
    return int(size)


def parse_ulimits(values: Sequence[str]) -> list[str]:
    """Return --ulimit values as "NAME=SOFT:HARD", sorted; of one name, the last counts.

    Raises:
        UsageError: in docker's words.
    """
    found: dict[str, str] = {}
    for text in values:
        name, mark, limits = text.partition("=")
        if not mark:
            raise _bad_ulimit(text, f"invalid ulimit argument: {text}")
        if name not in ULIMITS:
            raise _bad_ulimit(text, f"invalid ulimit type: {name}")
        numbers = limits.split(":")
        if len(numbers) > 2:
            raise _bad_ulimit(text, "it can only have up to two values, soft[:hard]")
        if not all(_INTEGER.fullmatch(number) for number in numbers):
            raise _bad_ulimit(text, "its values are whole numbers, -1 for no limit")
        soft, hard = int(numbers[0]), int(numbers[-1])
        if max(abs(soft), abs(hard)) > _LARGEST:
            raise _bad_ulimit(text, "its values are too large")
        if hard != -1 and (soft == -1 or soft > hard):
            raise _bad_ulimit(
                text, "ulimit soft limit must be less than or equal to hard limit: "
                f"{soft} > {hard}"
            )  # fmt: skip
        found[name] = f"{name}={soft}:{hard}"
    return [found[name] for name in sorted(found)]


def _bad_ulimit(text: str, problem: str) -> UsageError:
    return UsageError(f'invalid argument "{text}" for "--ulimit" flag: {problem}')


def parse_resources(values: Sequence[str]) -> Resources:
    """Return --resource values, each a list of KEY=VALUE; of one key, the last counts.

    Raises:
        UsageError: an unknown key or a value out of its bounds.
    """
    found: dict[str, Any] = {}
    known = {
        field.name.removesuffix("_bytes").replace("_", "-"): field.name
        for field in fields(Resources)
    }
    for value in values:
        for key, text in _resource_pairs(value):
            if key not in known:
                raise InvalidValueError(
                    f'unknown resource "{key}": write one of {", ".join(known)}'
                )
            found[known[key]] = _resource(key, text)
    return Resources(**found)


def _resource_pairs(value: str) -> list[tuple[str, str]]:
    """Split at commas; a part without "=" continues the value before it ("cpuset-cpus=0,2")."""
    pairs: list[tuple[str, str]] = []
    for part in _comma_separated("--resource", value):
        key, mark, text = part.partition("=")
        if mark:
            pairs.append((key.strip().lower(), text))
        elif pairs and pairs[-1][0].startswith("cpuset-"):
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{part}")
        else:
            raise InvalidValueError(f'invalid --resource "{value}": "{part}" is not KEY=VALUE')
    return pairs


def _resource(key: str, text: str) -> int | str:
    flag = f"--resource {key}"
    if key.startswith("cpuset-"):
        if not re.fullmatch(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*", text):
            raise InvalidValueError(f'invalid {flag} "{text}"; write for example 0-3 or 0,1')
        return text
    if key == "memory-swap" and text == "-1":
        return -1
    if key.startswith("memory"):
        number = parse_bytes(flag, text)
    elif _INTEGER.fullmatch(text):
        number = int(text)
    else:
        raise InvalidValueError(f'invalid {flag} "{text}": it is a whole number')
    if not 0 < number <= _LARGEST:
        raise InvalidValueError(f'invalid {flag} "{text}": it must be greater than 0')
    return number
