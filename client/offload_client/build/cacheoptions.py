"""--cache-from, --cache-to and --cache-scope: docker buildx's meanings, and the pool's own cache.

The pool's cache needs none of these flags. Its kind is "offload"; "none" turns it off. All other
kinds are caches beside it, which BuildKit reads and writes itself.
Source: buildx's util/buildflags/cache.go and its reference of --cache-from and --cache-to.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

POOL = "offload"
OFF = "none"
IMPORT_KINDS = ("registry", "local", "gha", "s3", "azblob")
EXPORT_KINDS = (*IMPORT_KINDS, "inline")
_NEEDED = {
    ("--cache-from", "registry"): "ref",
    ("--cache-from", "local"): "src",
    ("--cache-to", "registry"): "ref",
    ("--cache-to", "local"): "dest",
}
_S3_KEYS = {
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
_GITHUB_ENVIRONMENT = {"token": "ACTIONS_RUNTIME_TOKEN", "url": "ACTIONS_CACHE_URL"}


@dataclass(frozen=True)
class OtherCache:
    """One cache that is not the pool's; `type` and `attributes` have BuildKit's names."""

    type: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheOptions:
    """What a command line says of caches.

    Attributes:
        scope: of the pool's cache, instead of that of the branch; empty for the branch's.
        read_scopes: of the pool's cache, read before all others.
        read_off: nothing is read from the pool's cache.
        write_off: nothing is written to the pool's cache.
        imports: caches beside it that are read.
        exports: caches beside it that are written.
    """

    scope: str = ""
    read_scopes: Sequence[str] = ()
    read_off: bool = False
    write_off: bool = False
    imports: Sequence[OtherCache] = ()
    exports: Sequence[OtherCache] = ()


def parse_caches(
    cache_from: Sequence[str],
    cache_to: Sequence[str],
    scope: str,
    environment: Mapping[str, str],
) -> CacheOptions:
    """Return the meaning of the values of the three flags.

    Args:
        cache_from: values of --cache-from.
        cache_to: values of --cache-to.
        scope: value of --cache-scope.
        environment: holds what `gha` and `s3` need and nobody writes on a command line.

    Raises:
        InvalidValueError: with the value and what is allowed.
    """
    read_scopes: list[str] = []
    imports: list[OtherCache] = []
    exports: list[OtherCache] = []
    read_off = write_off = False
    for text, kind, values in _entries("--cache-from", cache_from):
        if kind == OFF:
            _check_attributes("--cache-from", text, values, allowed=())
            read_off = True
        elif kind == POOL:
            _check_attributes("--cache-from", text, values, allowed=("scope",))
            read_scopes += [values["scope"]] if values.get("scope") else []
        elif (found := _other("--cache-from", text, kind, values, environment)) is not None:
            imports.append(found)
    for text, kind, values in _entries("--cache-to", cache_to):
        if kind == OFF:
            _check_attributes("--cache-to", text, values, allowed=())
            write_off = True
        elif kind == POOL:
            _check_attributes("--cache-to", text, values, allowed=())
        elif (found := _other("--cache-to", text, kind, values, environment)) is not None:
            exports.append(found)
    if read_off and read_scopes:
        raise InvalidValueError(
            f"--cache-from type={OFF} and type={POOL} contradict each other; leave one out"
        )
    return CacheOptions(
        scope=scope,
        read_scopes=tuple(dict.fromkeys(read_scopes)),
        read_off=read_off,
        write_off=write_off,
        imports=_unique(imports),
        exports=_unique(exports),
    )


def _entries(flag: str, texts: Sequence[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    for text in texts:
        if not text:
            continue
        try:
            fields = next(csv.reader(io.StringIO(text)), [])
        except csv.Error as error:
            raise InvalidValueError(f'invalid {flag} "{text}": {error}') from error
        if "=" not in text:
            # Names of images alone; each field is a cache of its own.
            yield from ((text, "registry", {"ref": name}) for name in fields if name)
            continue
        values: dict[str, str] = {}
        for part in fields:
            key, equals, value = part.partition("=")
            if not equals:
                raise InvalidValueError(f'invalid {flag} "{text}": invalid value {part}')
            values[key.strip().lower()] = value
        kind = values.pop("type", "")
        if not kind:
            raise InvalidValueError(f'invalid {flag} "{text}": type is required')
        yield text, kind, values


def _check_attributes(
    flag: str, text: str, values: Mapping[str, str], *, allowed: Sequence[str]
) -> None:
    unknown = sorted(values.keys() - set(allowed))
    if unknown:
        hint = "--cache-scope chooses the scope that is written" if unknown == ["scope"] else ""
        raise InvalidValueError(
            f'invalid {flag} "{text}": "{unknown[0]}" has no meaning for the pool\'s cache',
            hint=hint,
        )


def _other(
    flag: str,
    text: str,
    kind: str,
    values: dict[str, str],
    environment: Mapping[str, str],
) -> OtherCache | None:
    """Return a cache beside the pool's; None for one that does nothing here, as with buildx."""
    kinds = IMPORT_KINDS if flag == "--cache-from" else EXPORT_KINDS
    if kind not in kinds:
        hint = "an inline cache is read with type=registry" if kind == "inline" else ""
        raise InvalidValueError(
            f'invalid {flag} "{text}": type must be one of {", ".join((POOL, OFF, *kinds))}',
            hint=hint,
        )
    needed = _NEEDED.get((flag, kind))
    if needed and not values.get(needed):
        raise InvalidValueError(f'invalid {flag} "{text}": type={kind} requires {needed}')
    if kind == "gha":
        return _github(values, environment)
    if kind == "s3":
        _add(values, {"region": "AWS_REGION"}, environment)
        # A session token belongs to its keys: keys that are given go without that of others.
        if not (values.get("access_key_id") and values.get("secret_access_key")):
            _add(values, _S3_KEYS, environment)
        if not (values.get("access_key_id") and values.get("secret_access_key")):
            raise InvalidValueError(
                f'invalid {flag} "{text}": type=s3 needs access_key_id and secret_access_key',
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; nodes lend no keys",
            )
    if kind == "azblob" and not values.get("secret_access_key"):
        raise InvalidValueError(
            f'invalid {flag} "{text}": type=azblob needs secret_access_key',
            hint="nodes lend no keys",
        )
    return OtherCache(kind, values)


def _github(values: dict[str, str], environment: Mapping[str, str]) -> OtherCache | None:
    _add(values, _GITHUB_ENVIRONMENT, environment)
    if "version" not in values and environment.get("ACTIONS_CACHE_SERVICE_V2") in ("1", "true"):
        values["version"] = "2"
    if values.get("version") == "2":
        _add(values, {"url_v2": "ACTIONS_RESULTS_URL"}, environment)
    active = values.get("token") and (values.get("url") or values.get("url_v2"))
    return OtherCache("gha", values) if active else None


def _add(values: dict[str, str], names: Mapping[str, str], environment: Mapping[str, str]) -> None:
    for key, variable in names.items():
        if key not in values and environment.get(variable):
            values[key] = environment[variable]


def _unique(caches: Sequence[OtherCache]) -> tuple[OtherCache, ...]:
    found: list[OtherCache] = []
    for cache in caches:
        if cache not in found:
            found.append(cache)
    return tuple(found)
