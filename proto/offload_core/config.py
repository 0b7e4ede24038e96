"""Configuration: frozen dataclasses filled from TOML files, environment variables and options.

Precedence: option > environment > file > default. Unknown keys and wrong types are errors that
name the source, the key and what is allowed. Sizes and durations are strings with units.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from offload_core.errors import ConfigError
from offload_core.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")


def option(default: Any, about: str, *, unit: str = "", secret: bool = False) -> Any:
    """Declare one option of a configuration dataclass.

    Args:
        default: value when nothing sets it; `dataclasses.MISSING` makes it required.
        about: one sentence for the documentation.
        unit: `size` (bytes) or `duration` (seconds) for values written with units.
        secret: never shown; printed as ***.
    """
    metadata = {"about": about, "unit": unit, "secret": secret}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        ConfigError: it cannot be read or is not TOML; the sentence has file and line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def load(
    cls: type[T],
    *,
    file: Path | None,
    environment: Mapping[str, str],
    prefix: str,
    options: Mapping[str, Any] | None = None,
) -> T:
    """Build a configuration object.

    Args:
        cls: a frozen dataclass whose fields are made with `option`.
        file: TOML file, None for none.
        environment: variables; `PREFIX_FIELD` sets a field.
        prefix: for example "OFFLOAD_NODE".
        options: values of the command line; None values are left out.

    Raises:
        ConfigError: with source, key and what is allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    if file is not None:
        for key, raw in read_toml(file).items():
            if key not in fields:
                raise ConfigError(
                    f"{file}: unknown key {key!r}; known keys are {', '.join(sorted(fields))}"
                )
            values[key] = convert(raw, fields[key], hints[key], source=f"{file}: {key}")
    for name, field in fields.items():
        variable = f"{prefix}_{name.upper()}"
        if variable in environment:
            values[name] = convert(environment[variable], field, hints[name], source=variable)
    for name, value in (options or {}).items():
        if value is not None:
            values[name] = convert(value, fields[name], hints[name], source=f"--{name}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not set; set it in the configuration file "
            f"or as {prefix}_{missing[0].upper()}"
        )
    return cls(**values)


def convert(raw: Any, field: dataclasses.Field[Any], hint: Any, *, source: str) -> Any:
    """Return `raw` as the type of a field.

    Raises:
        ConfigError: it is of another type.
    """
    unit = field.metadata.get("unit", "")
    if isinstance(hint, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if raw is None or raw == "":
            return None
        hint = inner[0]
    try:
        if unit and isinstance(raw, str):
            return parse_size(raw) if unit == "size" else parse_duration(raw)
        return _plain(raw, hint)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from error
    except (TypeError, ValueError, OverflowError) as error:
        shown = "***" if field.metadata.get("secret") else repr(raw)
        raise ConfigError(f"{source}: {shown} is not {_type_name(hint)}") from error


def _plain(raw: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is bool:
        return _boolean(raw)
    if origin in (list, tuple):
        return origin(_plain(item, typing.get_args(hint)[0]) for item in _items(raw))
    if origin is dict:
        inner = typing.get_args(hint)[1]
        return {str(key): _plain(value, inner) for key, value in _table(raw).items()}
    if hint is Path:
        return Path(_checked(raw, str)).expanduser()
    if hint is str:
        return _checked(raw, str)
    return _number(raw, hint)


def _number(raw: Any, hint: Any) -> Any:
    if isinstance(raw, bool) or (hint is int and isinstance(raw, float)):
        raise ValueError(raw)
    value = hint(raw)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(raw)
    return value


def _checked(raw: Any, kind: type) -> Any:
    if not isinstance(raw, kind):
        raise ValueError(raw)
    return raw


def _items(raw: Any) -> list[Any]:
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    return list(_checked(raw, list))


def _table(raw: Any) -> dict[str, Any]:
    """Return a table, in a variable written as `KEY=VALUE;KEY=VALUE`."""
    if not isinstance(raw, str):
        return dict(_checked(raw, dict))
    pairs = [part.partition("=") for part in raw.split(";") if part.strip()]
    if not all(equals and key.strip() for key, equals, _ in pairs):
        raise ValueError(raw)
    return {key.strip(): value for key, _, value in pairs}


def _boolean(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(raw)


def _type_name(hint: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
    }
    if typing.get_origin(hint) is dict:
        return "a table of texts" if typing.get_args(hint)[1] is str else "a table of lists"
    return names.get(hint, str(hint))
