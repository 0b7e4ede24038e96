"""Reads `identity.toml`: who issues tokens, and what they stand for.

Everything that could only be a mistake is refused with its line, above all rules that would let
strangers in.
"""

from __future__ import annotations

import re
import ssl
import tomllib
from pathlib import Path
from typing import Any

from offload_builder.gateway.members import PROJECT_ID
from offload_builder.gateway.oidc.patterns import MAX_PATTERN, is_wildcard_only
from offload_builder.gateway.oidc.policy import (
    ALL_PROJECTS,
    ALLOWED_ALGORITHMS,
    DEFAULT_ALGORITHMS,
    REPLAY,
    Issuer,
    Policy,
    Rule,
)
from offload_builder.gateway.oidc.policykeys import ISSUER_KEYS, ROLES, RULE_KEYS, TOP_KEYS, Key
from offload_builder.gateway.oidc.presets import PRESETS
from offload_builder.gateway.oidc.templates import FACT_NAMES, check_template
from offload_builder.gateway.tokens import role_from_name
from offload_builder.tomllines import TomlLines
from offload_core.errors import ConfigError, OffloadError
from offload_core.units import parse_duration
from offload_core.weburls import check_web_url

MAX_FILE_BYTES = 1 << 20
MAX_CLOCK_SKEW = 300.0
MAX_CERTIFICATE_LIFETIME = 86_400.0

_NAME = re.compile(r"[a-z][a-z0-9-]{0,15}")
_MAX_WILDCARDS = 6


_REQUIRED_RULE_KEYS = ("name", "issuer", "role", "projects")


def read_policy(path: Path) -> Policy:
    """Return what a file says.

    Raises:
        ConfigError: "FILE, line N: ..." and what is allowed.
    """
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = data.decode("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the identity rules {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return _Reader(path, document, TomlLines(text)).policy()


class _Reader:
    def __init__(self, path: Path, document: dict[str, Any], lines: TomlLines) -> None:
        self._path = path
        self._document = document
        self._lines = lines

    def policy(self) -> Policy:
        self._check_keys(self._document, TOP_KEYS, ())
        audience = self._document.get("audience", "")
        issuers = {
            name: self._issuer(name, table, audience)
            for name, table in self._document.get("issuer", {}).items()
        }
        self._check_urls(issuers)
        people = [issuer for issuer in issuers.values() if issuer.client_id]
        if len(people) > 1:
            raise self._error(
                "people log in at one issuer; only one may have a client_id",
                "issuer", people[1].name, "client_id",
            )  # fmt: skip
        rules: list[Rule] = []
        for index, table in enumerate(self._document.get("rule", [])):
            rule = self._rule(index, table, issuers)
            if rule.name in {other.name for other in rules}:
                raise self._error(f'there are two rules "{rule.name}"', "rule", index, "name")
            rules.append(rule)
        of_pipelines = [item.audiences[0] for item in issuers.values() if not item.client_id]
        asked = audience if audience or not of_pipelines else of_pipelines[0]
        return Policy(
            issuers,
            tuple(rules),
            asked if of_pipelines else "",
            people[0] if people else None,
        )

    # --- Issuers.

    def _issuer(self, name: str, table: Any, audience: str) -> Issuer:
        place = ("issuer", name)
        if _NAME.fullmatch(name) is None:
            raise self._error(
                f'"{name[:40]}" cannot name an issuer: '
                "at most 16 lower-case letters, digits and dashes, a letter first", *place,
            )  # fmt: skip
        self._check_keys(table, ISSUER_KEYS, place)
        preset = PRESETS.get(table.get("preset", ""))
        if preset is None and "preset" in table:
            raise self._error(
                f'there is no preset "{table["preset"][:40]}"; there are {", ".join(PRESETS)}',
                *place, "preset",
            )  # fmt: skip
        url = table.get("url") or (preset.url if preset else "")
        if not url:
            raise self._error("needs the url of the issuer", *place)
        client_id = table.get("client_id", "")
        if client_id and preset:
            raise self._error("a preset is for pipelines; client_id is for people", *place)
        issuer = Issuer(
            name=name,
            url=self._url(url, *place, "url"),
            audiences=self._audiences(table, audience, client_id, url, place),
            preset=table.get("preset", ""),
            jwks_url=self._url(table["jwks_url"], *place, "jwks_url")
            if "jwks_url" in table
            else "",
            ca_file=self._ca_file(table, place),
            algorithms=self._algorithms(table, place),
            clock_skew=self._seconds(table, "clock_skew", 60.0, MAX_CLOCK_SKEW, place, zero=True),
            max_token_age=self._seconds(table, "max_token_age", 86_400.0, 30 * 86_400.0, place),
            replay=table.get("replay", preset.replay if preset else "until-expiry"),
            certificate_lifetime=self._seconds(
                table, "certificate_lifetime", 3600.0, MAX_CERTIFICATE_LIFETIME, place
            ),
            claims=self._facts(table, place),
            client_id=client_id,
            scopes=self._texts(table, "scopes", place)
            or (("openid", "profile", "email", "offline_access") if client_id else ()),
        )
        if issuer.replay not in REPLAY:
            raise self._error(f"replay is one of {', '.join(REPLAY)}", *place, "replay")
        if client_id and "openid" not in issuer.scopes:
            raise self._error('scopes must have "openid"', *place, "scopes")
        return issuer

    def _audiences(
        self, table: dict[str, Any], audience: str, client_id: str, url: str, place: tuple[str, ...]
    ) -> tuple[str, ...]:
        own = table.get("audience", client_id or audience)
        found = (own,) if isinstance(own, str) else self._texts(table, "audience", place)
        if found in ((), ("",)) and table.get("preset") == "circleci":
            # CircleCI makes tokens for the organisation, whose id ends its URL.
            found = (url.rpartition("/")[2],)
        if not found or not all(found):
            raise self._error(
                "needs an audience, here or at the top of the file: without one a token that was "
                "made for another service would do", *place,
            )  # fmt: skip
        return found

    def _ca_file(self, table: dict[str, Any], place: tuple[str, ...]) -> Path | None:
        if "ca_file" not in table:
            return None
        path = self._path.parent / Path(table["ca_file"]).expanduser()
        try:
            ssl.create_default_context(cafile=str(path))
        except OSError as error:
            raise self._error(
                f"cannot use the certificates in {path}", *place, "ca_file"
            ) from error
        return path

    def _algorithms(self, table: dict[str, Any], place: tuple[str, ...]) -> tuple[str, ...]:
        names = self._texts(table, "algorithms", place) or DEFAULT_ALGORITHMS
        for name in names:
            if name not in ALLOWED_ALGORITHMS:
                raise self._error(
                    f'the algorithm "{name[:20]}" is not allowed; allowed are '
                    f"{', '.join(ALLOWED_ALGORITHMS)}", *place, "algorithms",
                )  # fmt: skip
        return names

    def _facts(self, table: dict[str, Any], place: tuple[str, ...]) -> dict[str, str]:
        facts = table.get("claims", {})
        if facts and "preset" in table:
            raise self._error("a preset knows its claims; leave this out", *place, "claims")
        for name, template in facts.items():
            if name not in FACT_NAMES:
                raise self._error(
                    f'unknown key "{name[:40]}"; known keys are {", ".join(FACT_NAMES)}',
                    *place, "claims", name,
                )  # fmt: skip
            self._template(template, *place, "claims", name)
            if "{" not in template and template not in ("true", "false"):
                raise self._error(
                    f'"{template[:40]}" would be the same for every token; write {{CLAIM}}',
                    *place, "claims", name,
                )  # fmt: skip
        return dict(facts)

    def _check_urls(self, issuers: dict[str, Issuer]) -> None:
        seen: dict[str, str] = {}
        for issuer in issuers.values():
            if issuer.url in seen:
                raise self._error(
                    f'has the url of the issuer "{seen[issuer.url]}"', "issuer", issuer.name, "url"
                )
            seen[issuer.url] = issuer.name

    # --- Rules.

    def _rule(self, index: int, table: Any, issuers: dict[str, Issuer]) -> Rule:
        place = ("rule", index)
        self._check_keys(table, RULE_KEYS, place)
        for key in _REQUIRED_RULE_KEYS:
            if not table.get(key):
                raise self._error(f"this rule needs {key}", *place)
        issuer = issuers.get(table["issuer"])
        if issuer is None:
            known = ", ".join(issuers) or "none yet"
            raise self._error(
                f'there is no issuer "{table["issuer"][:40]}"; there are {known}',
                *place, "issuer",
            )  # fmt: skip
        rule = Rule(
            name=table["name"][:100],
            line=self._lines.of(*place),
            issuer=issuer.name,
            when=self._conditions(table, "when", place),
            unless=self._conditions(table, "unless", place),
            role=self._role(table, issuer, place),
            projects=self._projects(table, place),
            fork=table.get("fork"),
            pull_request=table.get("pull_request"),
            protected=table.get("protected"),
            member=table.get("member", ""),
        )
        if rule.member:
            self._template(rule.member, *place, "member")
        self._check_anchors(rule, issuer, place)
        return rule

    def _conditions(
        self, table: dict[str, Any], key: str, place: tuple[str | int, ...]
    ) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for claim, value in table.get(key, {}).items():
            values = value if isinstance(value, list) else [value]
            where = (*place, key, claim)
            if not values:
                raise self._error(f"{claim} has an empty list; no text can match it", *where)
            for item in values:
                self._pattern(claim, item, where)
            found[claim] = tuple(
                ("true" if item else "false") if isinstance(item, bool) else str(item)
                for item in values
            )
        return found

    def _pattern(self, claim: str, value: Any, where: tuple[str | int, ...]) -> None:
        if isinstance(value, (bool, int)):
            return
        if not isinstance(value, str):
            raise self._error(f"{claim} must be a text, or a list of texts", *where)
        if not value or len(value) > MAX_PATTERN or value.count("*") > _MAX_WILDCARDS:
            raise self._error(
                f"a pattern has 1 to {MAX_PATTERN} characters, at most {_MAX_WILDCARDS} of them *",
                *where,
            )
        if is_wildcard_only(value):
            raise self._error(
                f'the pattern "{value}" matches whatever {claim} says; name what you mean', *where
            )

    def _role(self, table: dict[str, Any], issuer: Issuer, place: tuple[str | int, ...]) -> Any:
        if table["role"] not in ROLES:
            raise self._error(
                f'there is no role "{table["role"][:40]}" for a rule; there are '
                f"{', '.join(ROLES)}", *place, "role",
            )  # fmt: skip
        if table["role"] == "admin" and not issuer.client_id:
            raise self._error(
                "only people, who log in at the issuer with a client_id, may become admin",
                *place, "role",
            )  # fmt: skip
        return role_from_name(table["role"])

    def _projects(self, table: dict[str, Any], place: tuple[str | int, ...]) -> tuple[str, ...]:
        names = self._texts(table, "projects", place)
        for name in names:
            if name == ALL_PROJECTS and len(names) == 1:
                continue
            if "{" in name:
                self._template(name, *place, "projects")
            elif PROJECT_ID.fullmatch(name) is None:
                raise self._error(
                    f'"{name[:40]}" is not the name of a project; "*" alone is for all',
                    *place, "projects",
                )  # fmt: skip
        return names

    def _check_anchors(self, rule: Rule, issuer: Issuer, place: tuple[str | int, ...]) -> None:
        if not rule.when:
            raise self._error(
                f'the rule "{rule.name}" has no condition in when: it would let in everyone '
                f"with a token of {issuer.url}", *place,
            )  # fmt: skip
        preset = issuer.known
        if preset is None or issuer.url != preset.url or not preset.anchors:
            return
        for claim, patterns in rule.when.items():
            begin = preset.anchors.get(claim)
            if begin is not None and all(begin.match(pattern) for pattern in patterns):
                return
        raise self._error(
            f'the rule "{rule.name}" does not say whose runs it means: everybody in the world has '
            f"tokens of {issuer.url}; give at least one of {', '.join(preset.anchors)} with an "
            "owner that has no wildcard",
            *place, "when",
        )  # fmt: skip

    # --- Values.

    def _check_keys(self, table: Any, keys: dict[str, Key], place: tuple[str | int, ...]) -> None:
        if not isinstance(table, dict):
            raise self._error("this must be a table", *place)
        for name, value in table.items():
            if name not in keys:
                raise self._error(
                    f'unknown key "{name[:40]}"; known keys are {", ".join(keys)}', *place, name
                )
            if not isinstance(value, keys[name].kind):
                raise self._error(f"{name} must be: {keys[name].form}", *place, name)

    def _texts(
        self, table: dict[str, Any], key: str, place: tuple[str | int, ...]
    ) -> tuple[str, ...]:
        values = table.get(key, [])
        if not all(isinstance(item, str) and item for item in values):
            raise self._error(f"{key} must be a list of texts", *place, key)
        return tuple(values)

    def _seconds(
        self,
        table: dict[str, Any],
        key: str,
        default: float,
        most: float,
        place: tuple[str | int, ...],
        *,
        zero: bool = False,
    ) -> float:
        if key not in table:
            return default
        try:
            seconds = parse_duration(table[key])
        except OffloadError as error:
            raise self._error(f"{key}: {error.message}", *place, key) from error
        if seconds > most or seconds < 0 or (not zero and seconds == 0):
            raise self._error(
                f"{key} is greater than 0 and at most {most / 60:.0f} minutes", *place, key
            )
        return seconds

    def _url(self, url: str, *place: str | int) -> str:
        try:
            return check_web_url(url)
        except ConfigError as error:
            raise self._error(error.message, *place) from error

    def _template(self, template: Any, *place: str | int) -> None:
        try:
            check_template(template)
        except ConfigError as error:
            raise self._error(error.message, *place) from error

    def _error(self, sentence: str, *place: str | int) -> ConfigError:
        where = ".".join(str(part) for part in place if isinstance(part, str))
        prefix = f"{where}: " if place[:1] == ("issuer",) else ""
        return ConfigError(f"{self._path}, line {self._lines.of(*place)}: {prefix}{sentence}")
