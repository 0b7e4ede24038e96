"""Compose files as bake files: what `build` of each service says.

Sources: the compose specification, chapters "build" and "interpolation", and how docker buildx
turns services into targets (its bake reference, "Building from Compose file").
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Any

from offload_client.bake.definition import OLD_NAMES
from offload_client.build.remotecontext import is_remote
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.bake.definition import Definition

NEEDS_BUILDX = "install docker buildx, which reads all of a compose file"
_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_]\w*)"
    r"|\{(?P<name>[A-Za-z_]\w*)(?:(?P<how>:?[-?+])(?P<word>[^}]*))?\})"
)
_TEXTS = {
    "context": "context",
    "dockerfile": "dockerfile",
    "dockerfile_inline": "dockerfile-inline",
    "target": "target",
    "network": "network",
    "shm_size": "shm-size",
}
_LISTS = {
    "tags": "tags",
    "platforms": "platforms",
    "cache_from": "cache-from",
    "cache_to": "cache-to",
    "ssh": "ssh",
    "entitlements": "entitlements",
}
_SWITCHES = {"pull": "pull", "no_cache": "no-cache"}
_OWN = frozenset(
    ("args", "labels", "additional_contexts", "extra_hosts", "ulimits", "secrets", "provenance",
     "sbom", "x-bake", "privileged", "isolation")
)  # fmt: skip


def parse_yaml(file: str, text: str) -> dict[str, Any]:
    """Return the document of a compose file.

    Raises:
        BakeError: it is no YAML mapping, or PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise BakeError(
            f"{file} is a compose file, and neither docker buildx nor PyYAML is there to read it",
            hint="install docker buildx, or run: pip install 'offload-build[bake]'",
        ) from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else file
        problem = getattr(error, "problem", "") or "it cannot be read"
        raise BakeError(f"{where}: this is not YAML: {problem}") from error
    if not isinstance(document, dict):
        raise BakeError(f"{file} is not a compose file: it has no services")
    return document


class ComposeFile:
    """One compose file with its variables replaced."""

    def __init__(
        self, file: str, document: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        """Take a file.

        Args:
            file: its name, for errors.
            document: its content.
            environment: for the variables, with those of `.env`.

        Raises:
            BakeError: a variable that must be set is not.
        """
        self._file = file
        self._environment = environment
        for key in ("include",):
            if document.get(key):
                raise BakeError(
                    f'{file}: "{key}" is not supported without docker buildx', hint=NEEDS_BUILDX
                )
        self._document = self._replaced(dict(document))

    def into(self, definition: Definition) -> None:
        """Add the services that are built as targets, and all of them as the default group.

        Raises:
            BakeError: the file has another form.
        """
        services = self._document.get("services") or {}
        if not isinstance(services, dict):
            raise self._bad("services", "is not a mapping")
        names = []
        for service, content in services.items():
            fields = content if isinstance(content, dict) else {}
            if fields.get("extends"):
                raise BakeError(
                    f'{self._file}: "extends" of service {service} is not supported without '
                    "docker buildx",
                    hint=NEEDS_BUILDX,
                )
            if fields.get("build") is None:
                continue
            # A name of a service may have a dot, that of a target may not.
            name = str(service).replace(".", "_")
            definition.add_target(name, self._target(str(service), fields))
            names.append(name)
        definition.add_group("default", sorted(names))

    def _target(self, service: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        build = fields["build"]
        if isinstance(build, str):
            build = {"context": build}
        if not isinstance(build, dict):
            raise self._bad(service, '"build" is neither a path nor a mapping')
        known = {*_TEXTS, *_LISTS, *_SWITCHES, *_OWN}
        for key in build:
            if key not in known and not str(key).startswith("x-"):
                raise self._bad(service, f'"build" has an unknown field "{key}"')
        for key in ("privileged", "isolation"):
            if build.get(key):
                raise self._bad(service, f'"{key}" of "build" has no meaning with BuildKit')
        target: dict[str, Any] = {
            name: _text(build[key]) for key, name in _TEXTS.items() if build.get(key) is not None
        }
        if context := target.get("context"):
            target["context"] = _path(context)
        target |= {
            field: [_text(item) for item in _sequence(build[key])]
            for key, field in _LISTS.items()
            if build.get(key)
        }
        target |= {field: bool(build[key]) for key, field in _SWITCHES.items() if build.get(key)}
        target |= self._maps(service, build, fields)
        target["attest"] = [
            f"type={kind},{_attestation(build[kind])}"
            for kind in ("provenance", "sbom")
            if build.get(kind) is not None
        ]
        secrets = build.get("secrets") or []
        if not isinstance(secrets, list):
            raise self._bad(service, '"secrets" of "build" is not a list')
        target["secret"] = [self._secret(service, item) for item in secrets]
        for key, value in self._object(service, "x-bake", build.get("x-bake")).items():
            extra = str(key)
            target[OLD_NAMES.get(extra, extra)] = _sequence(value) if _takes_list(extra) else value
        if not target.get("tags") and fields.get("image"):
            target["tags"] = [str(fields["image"])]
        return {key: value for key, value in target.items() if value not in ([], {})}

    def _maps(
        self, service: str, build: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        own = self._pairs(service, "environment", fields)
        arguments: dict[str, Any] = {}
        for name, value in self._pairs(service, "args", build).items():
            found = own.get(name, self._environment.get(name)) if value is None else value
            if found is not None:
                arguments[name] = found
        contexts = {
            name: "target:" + value.removeprefix("service:").replace(".", "_")
            if (value or "").startswith("service:")
            else _path(value or "")
            for name, value in self._pairs(service, "additional_contexts", build).items()
            if value is not None
        }
        hosts = {}
        for name, value in self._pairs(service, "extra_hosts", build, ":").items():
            if value is None:
                raise self._bad(service, f'"extra_hosts" has no address for "{name}"')
            hosts[name] = value
        labels = self._pairs(service, "labels", build)
        limits = self._object(service, "ulimits", build.get("ulimits"))
        return {
            "args": arguments,
            "labels": {name: value or "" for name, value in labels.items()},
            "contexts": contexts,
            "extra-hosts": hosts,
            "ulimits": [self._limit(service, name, item) for name, item in limits.items()],
        }

    def _limit(self, service: str, name: str, value: Any) -> str:
        soft = hard = value
        if isinstance(value, dict):
            soft, hard = value.get("soft"), value.get("hard")
        if soft is None or hard is None:
            raise self._bad(service, f'"{name}" of "ulimits" needs a number, or "soft" and "hard"')
        return f"{name}={soft}:{hard}"

    def _object(self, service: str, key: str, value: Any) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._bad(service, f'"{key}" is not a mapping')
        return value

    def _pairs(
        self, service: str, key: str, fields: Mapping[str, Any], separator: str = "="
    ) -> dict[str, str | None]:
        value = fields.get(key)
        if not isinstance(value, dict | list | None):
            raise self._bad(service, f'"{key}" is neither a mapping nor a list')
        return _mapping(value, separator)

    def _secret(self, service: str, item: Any) -> str:
        source = str(item.get("source", "") if isinstance(item, dict) else item)
        name = str(item.get("target") or source) if isinstance(item, dict) else source
        defined = self._object(service, "secrets", self._document.get("secrets")).get(source)
        if not isinstance(defined, dict):
            raise self._bad(service, f'there is no secret "{source}" in "secrets"')
        if defined.get("environment"):
            return f"type=env,id={name},env={defined['environment']}"
        if defined.get("file"):
            return f"id={name},src={defined['file']}"
        raise self._bad(service, f'the secret "{source}" has neither a file nor a variable')

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            return _REFERENCE.sub(self._reference, value)
        if isinstance(value, list):
            return [self._replaced(item) for item in value]
        if isinstance(value, dict):
            return {key: self._replaced(item) for key, item in value.items()}
        return value

    def _reference(self, match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["plain"] or match["name"]
        value, how = self._environment.get(name), match["how"] or ""
        missing = value is None or (how.startswith(":") and not value)
        if how.endswith("+"):
            return "" if missing else match["word"]
        if missing and how.endswith("?"):
            raise BakeError(f"{self._file}: the variable {name} is not set: {match['word']}")
        if missing:
            return match["word"] if how.endswith("-") else ""
        return value or ""

    def _bad(self, service: str, problem: str) -> BakeError:
        return BakeError(f"{self._file}: {service}: {problem}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _path(text: str) -> str:
    """Return a context in the form that docker's reader of compose files gives it."""
    is_path = "://" not in text and ":" not in text and not is_remote(text)
    return posixpath.normpath(text) if is_path else text


def _sequence(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [f"{key}={item}" if item is not None else str(key) for key, item in value.items()]
    return list(value) if isinstance(value, list) else [value]


def _takes_list(key: str) -> bool:
    return key in (
        "tags", "platforms", "platform", "cache-from", "cache-to", "output", "secret", "secrets",
        "ssh", "attest", "no-cache-filter", "ulimits", "entitlements", "annotations",
    )  # fmt: skip


def _mapping(value: Any, separator: str = "=") -> dict[str, str | None]:
    """Return a mapping or a list of NAME=VALUE as the former."""
    if isinstance(value, dict):
        return {str(key): None if item is None else _text(item) for key, item in value.items()}
    found: dict[str, str | None] = {}
    for text in value or ():
        mark = separator if separator in str(text) else "="
        name, given, rest = str(text).partition(mark)
        found[name] = rest if given else None
    return found


def _attestation(value: Any) -> str:
    text = _text(value)
    if text in ("true", "false"):
        return f"disabled={'false' if text == 'true' else 'true'}"
    return text
