"""Reads policy files. Everything that could only be a mistake is a finding with its line."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from offload_builder.egress.policy.contradictions import contradictions
from offload_builder.egress.policy.keys import RULE_KEYS, TOP_KEYS, Key
from offload_builder.egress.policy.model import (
    CONNECTOR,
    Action,
    HostTarget,
    Layer,
    Opening,
    Place,
    Policy,
    PortRange,
    Posture,
    Protocol,
    Rule,
    Target,
)
from offload_builder.egress.policy.presets import PRESETS, preset_rules
from offload_builder.egress.policy.targets import (
    join_ports,
    never_opened,
    parse_ports,
    parse_target,
    protected_inside,
)
from offload_builder.egress.policy.weburl import UrlTarget
from offload_builder.tomllines import TomlLines
from offload_core.errors import ConfigError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20
MAX_RULES = 20_000
MAX_TEXT = 300
RULE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
RESERVED_IDS = ("preset-", "protected-", "default-", "project-", "build-", "registry-")
SOON = timedelta(days=14)

_SYNTAX_LINE = re.compile(r"\(at line (\d+), column \d+\)")


@dataclass(frozen=True, order=True)
class Finding:
    """Something about a file that people should know.

    Attributes:
        serious: the file cannot be used with it.
        sentence: what is wrong and what to do.
    """

    place: Place
    serious: bool
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {'' if self.serious else 'warning: '}{self.sentence}"


@dataclass(frozen=True)
class Reading:
    """What came of a file.

    Attributes:
        policy: None when a finding is serious.
        findings: in the order of their lines.
    """

    policy: Policy | None
    findings: tuple[Finding, ...]

    def require(self) -> Policy:
        """Return the policy.

        Raises:
            ConfigError: there is none; all serious findings, one in a line.
        """
        if self.policy is None:
            raise ConfigError("\n".join(str(item) for item in self.findings if item.serious))
        return self.policy


def read_file(path: Path, layer: Layer = Layer.POOL, *, now: datetime | None = None) -> Reading:
    """Read a file. Blocks.

    Raises:
        ConfigError: it cannot be read.
    """
    return read_text(load_text(path), file=str(path), layer=layer, now=now)


def load_text(path: Path) -> str:
    """Return the text of a policy file.

    Raises:
        ConfigError: it cannot be read, is too large or no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the policy {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: it is not UTF-8 text") from error


def read_text(
    text: str,
    *,
    file: str,
    layer: Layer = Layer.POOL,
    version: int = 0,
    now: datetime | None = None,
) -> Reading:
    """Read the text of a policy.

    Args:
        text: TOML.
        file: its name, for sentences.
        layer: whose policy it is.
        version: its number in the store; 0 for a text that is not from there. Rules of a stored
            one may have expired.
        now: for rules that expire; the clock's by default.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _SYNTAX_LINE.search(str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        sentence = f"this is not valid TOML: {_SYNTAX_LINE.sub('', str(error)).strip()}"
        return Reading(None, (Finding(Place(file, line), True, sentence),))
    except (ValueError, RecursionError):
        # Numbers of thousands of digits, and lists within thousands of lists.
        why = "this is not valid TOML: it has a value that is too long or too deep"
        return Reading(None, (Finding(Place(file, 1), True, why),))
    reader = _Reader(text, document, file, layer, now or datetime.now(UTC))
    policy = reader.policy(version)
    findings = tuple(sorted(reader.findings, key=lambda item: item.place.line))
    return Reading(None if any(item.serious for item in findings) else policy, findings)


class _Reader:
    def __init__(
        self, text: str, document: dict[str, Any], file: str, layer: Layer, now: datetime
    ) -> None:
        self.findings: list[Finding] = []
        self._document = document
        self._file = file
        self._layer = layer
        self._now = now
        self._lines = TomlLines(text)
        self._text = text.splitlines()

    def policy(self, version: int) -> Policy:
        top = self._known(self._document, TOP_KEYS)
        posture = self._posture(top)
        presets = self._presets(top)
        rules = [
            rule
            for name in presets
            for rule in preset_rules(name, self._place("presets", item=name), self._layer)
        ]
        rules += self._rules(top.get("rule", []), stored=version > 0)
        policy = Policy(
            posture=posture,
            rules=tuple(rules),
            presets=presets,
            layer=self._layer,
            name=self._line_of_text(top, "pool"),
            contact=self._line_of_text(top, "contact"),
            may_allow=self._opening(top),
            proxied=top.get("proxied", False),
            check_names=top.get("check_names", True),
            version=version,
            source=self._file,
        )
        for place, serious, sentence in contradictions(policy):
            self.findings.append(Finding(place, serious, sentence))
        return policy

    # --- The top of the file.

    def _posture(self, top: dict[str, Any]) -> Posture | None:
        allowed = [item.value for item in Posture]
        if "posture" not in top:
            if self._layer is Layer.POOL:
                self._bad(
                    'needs a posture: "open" allows all but the protected ranges, "allowlist" '
                    "only what rules and presets allow"
                )
            return Posture.ALLOWLIST if self._layer is Layer.BUILD else None
        value = top["posture"]
        if value not in allowed:
            self._bad(f'there is no posture "{value[:40]}"; take {" or ".join(allowed)}', "posture")
            return None
        if value == "open" and self._layer is Layer.PROJECT:
            self._bad(
                "a project can only tighten the posture of its pool; leave posture out, or take "
                '"allowlist"', "posture",
            )  # fmt: skip
        return Posture(value)

    def _presets(self, top: dict[str, Any]) -> tuple[str, ...]:
        names: list[str] = []
        for name in top.get("presets", []):
            if not isinstance(name, str) or name not in PRESETS:
                self._bad(
                    f"there is no preset {_shown(name)}; there are {', '.join(PRESETS)}",
                    "presets", item=name,
                )  # fmt: skip
            elif name in names:
                self._note(f'the preset "{name}" is there twice', "presets", item=name)
            else:
                names.append(name)
        return tuple(names)

    def _opening(self, top: dict[str, Any]) -> Opening:
        value = top.get("projects_may_allow", "nothing")
        key = "projects_may_allow"
        if isinstance(value, list):
            return Opening(targets=self._targets(value, key))
        if value not in ("nothing", "public"):
            self._bad('this is "nothing", "public", or a list of targets', key)
        return Opening(public=value == "public")

    def _line_of_text(self, top: dict[str, Any], key: str, *place: str | int) -> str:
        value = str(top.get(key, ""))
        if len(value) > MAX_TEXT or not value.isprintable():
            self._bad(f"{key} is one line of at most {MAX_TEXT} characters", *place, key)
            return ""
        return value

    # --- Rules.

    def _rules(self, tables: list[Any], *, stored: bool) -> list[Rule]:
        if len(tables) > MAX_RULES:
            self._bad(
                f"there are {len(tables)} rules; at most {MAX_RULES} are possible, with any "
                "number of targets each", "rule",
            )  # fmt: skip
            return []
        rules: list[Rule] = []
        seen: dict[str, int] = {}
        for index, table in enumerate(tables):
            rule = self._rule(table, index, stored=stored)
            if rule is None:
                continue
            if rule.id in seen:
                self._bad(
                    f'there is a rule "{rule.id}" already, in line {seen[rule.id]}; give this '
                    "one another id", "rule", index, "id",
                )  # fmt: skip
                continue
            seen[rule.id] = rule.place.line
            rules.append(rule)
        return rules

    def _rule(self, raw: Any, index: int, *, stored: bool) -> Rule | None:
        place = ("rule", index)
        before = len(self.findings)
        table = self._known(raw, RULE_KEYS, *place)
        rule_id = self._id(table, place)
        actions = [item for item in Action if item.value in table]
        if len(actions) != 1:
            self._bad("a rule has either allow or deny, with a list of targets", *place)
            return None
        action = actions[0]
        targets = self._targets(table[action.value], *place, action.value)
        protocol = self._protocol(table, action, place)
        if any(isinstance(target, UrlTarget) for target in targets):
            protocol = Protocol.TCP
        rule = Rule(
            id=rule_id,
            action=action,
            targets=targets,
            ports=self._ports(table, place),
            protocol=protocol,
            comment=self._line_of_text(table, "comment", *place),
            owner=self._line_of_text(table, "owner", *place),
            expires=self._expires(table, place),
            private=table.get("private", False),
            via=table.get("via", ""),
            place=self._place(*place),
            layer=self._layer,
        )
        self._check(rule, table, place, stored=stored)
        bad = any(item.serious for item in self.findings[before:])
        return None if bad else rule

    def _id(self, table: dict[str, Any], place: tuple[str | int, ...]) -> str:
        rule_id = str(table.get("id", ""))
        if "id" not in table:
            self._bad('a rule needs an id, such as id = "artifacts"', *place)
        elif RULE_ID.fullmatch(rule_id) is None:
            self._bad(
                f'"{rule_id[:60]}" cannot be the id of a rule: at most 40 lower-case letters, '
                "digits and dashes between them", *place, "id",
            )  # fmt: skip
        elif rule_id.startswith(RESERVED_IDS):
            self._bad(
                f'ids that begin with "{rule_id.partition("-")[0]}-" are ours; take another one',
                *place, "id",
            )  # fmt: skip
        return rule_id

    def _targets(self, values: list[Any], *place: str | int) -> tuple[Target, ...]:
        # A dictionary keeps the order and finds what is there twice among thousands.
        targets: dict[Target, None] = {}
        if not values and place[0] == "rule":
            self._bad("the list is empty; name at least one target", *place)
        for value in values:
            if not isinstance(value, str):
                self._bad(f"a target is a text, not {_shown(value)}", *place, item=value)
                continue
            target = self._try(parse_target, value, *place)
            if target is not None and target in targets:
                self._note(f'"{value}" is there twice', *place, item=value)
            elif target is not None:
                targets[target] = None
        return tuple(targets)

    def _ports(self, table: dict[str, Any], place: tuple[str | int, ...]) -> tuple[PortRange, ...]:
        if "ports" in table and not table["ports"]:
            self._bad("the list of ports is empty; leave ports out for all", *place, "ports")
        found = [self._try(parse_ports, value, *place, "ports") for value in table.get("ports", [])]
        return join_ports([item for item in found if item is not None])

    def _protocol(
        self, table: dict[str, Any], action: Action, place: tuple[str | int, ...]
    ) -> Protocol:
        default = Protocol.TCP if action is Action.ALLOW else Protocol.ANY
        value = table.get("protocol", default.value)
        allowed = [item.value for item in Protocol]
        if value not in allowed:
            self._bad(
                f'there is no protocol "{value[:40]}"; there are {", ".join(allowed)}',
                *place, "protocol",
            )  # fmt: skip
            return default
        return Protocol(value)

    def _expires(self, table: dict[str, Any], place: tuple[str | int, ...]) -> datetime | None:
        value = table.get("expires")
        if isinstance(value, datetime):
            if value.tzinfo is None:
                self._bad("a time needs its zone, such as 2030-01-31T12:00:00Z", *place, "expires")
                return None
            return value.astimezone(UTC)
        if isinstance(value, date):
            return datetime.combine(value, time.min, UTC) + timedelta(days=1)
        return None

    def _check(
        self,
        rule: Rule,
        table: dict[str, Any],
        place: tuple[str | int, ...],
        *,
        stored: bool,
    ) -> None:
        if rule.protocol is Protocol.ICMP and rule.ports:
            self._bad("icmp has no ports; leave ports out", *place, "ports")
        if rule.urls:
            self._check_urls(rule, table, place)
        if rule.private and (rule.action is Action.DENY or not (rule.hosts or rule.urls)):
            self._bad(
                "private is for hosts that a rule allows; an address is allowed by naming it",
                *place, "private",
            )  # fmt: skip
        if "via" in table and (why := _why_not_via(rule)):
            self._bad(why, *place, "via")
        if rule.action is Action.DENY and rule.hosts and ("ports" in table or "protocol" in table):
            key = "ports" if "ports" in table else "protocol"
            self._bad(
                f"a host is denied as a whole, because its name is not looked up; leave {key} "
                "out, or deny its addresses", *place, key,
            )  # fmt: skip
        if rule.expires is not None and not rule.holds_at(self._now) and not stored:
            self._bad(
                f'the rule "{rule.id}" expired on {_day(rule.expires)}; remove it, or give it a '
                "later date", *place, "expires",
            )  # fmt: skip
        elif rule.expires is not None and rule.expires - self._now < SOON:
            self._note(f'the rule "{rule.id}" ends {_day(rule.expires)}', *place, "expires")
        if rule.action is Action.ALLOW:
            for target in rule.targets:
                self._check_allowed(target, place)

    def _check_urls(self, rule: Rule, table: dict[str, Any], place: tuple[str | int, ...]) -> None:
        where = (*place, rule.action.value)
        written = next(
            (item for item in table[rule.action.value] if "://" in str(item)), rule.urls[0]
        )
        if self._layer is Layer.BUILD:
            self._bad(
                f"{rule.urls[0]} has no place in the policy of a build; name the host", *where,
                item=written,
            )  # fmt: skip
        elif self._document.get("proxied") is not True:
            self._bad(
                f"{rule.urls[0]} is a URL, and requests of steps are seen by URL only behind "
                "BuildKit's proxy: a policy with URLs needs proxied = true at its top", *where,
                item=written,
            )  # fmt: skip
        if len(rule.urls) < len(rule.targets):
            self._bad("URLs need a rule of their own, without other targets", *where, item=written)
        for key in ("ports", "protocol"):
            if key in table:
                self._bad(f"a URL has its port in it; leave {key} out", *place, key)

    def _check_allowed(self, target: Target, place: tuple[str | int, ...]) -> None:
        where = (*place, "allow")
        if isinstance(target, (HostTarget, UrlTarget)):
            if target.wildcard and "." not in target.name:
                self._note(
                    f"{target} allows all names of a whole top-level domain", *where,
                    item=str(target),
                )  # fmt: skip
        elif why := never_opened(target.network):
            self._bad(f"{why}; leave it out", *where, item=str(target))
        elif inside := protected_inside(target.network):
            shown = ", ".join(str(item) for item in inside[:3])
            more = " and others" if len(inside) > 3 else ""
            self._note(
                f"{target} does not open the protected ranges in it ({shown}{more}); name those "
                "that you mean", *where, item=str(target),
            )  # fmt: skip

    # --- Values.

    def _known(self, table: Any, keys: dict[str, Key], *place: str | int) -> dict[str, Any]:
        """Return the entries that may be there and have the right type."""
        found: dict[str, Any] = {}
        if not isinstance(table, dict):
            self._bad("this must be a table [[rule]]", *place)
            return found
        known = [name for name, key in keys.items() if self._layer in key.layers]
        for name, value in table.items():
            if name not in keys:
                self._bad(
                    f'unknown key "{name[:40]}"; known keys are {", ".join(known)}', *place, name
                )
            elif name not in known:
                self._bad(f"{name} has no place in the policy of a {self._layer.value}; leave it "
                          "out", *place, name)  # fmt: skip
            elif not isinstance(value, keys[name].kinds) or (
                isinstance(value, bool) and bool not in keys[name].kinds
            ):
                self._bad(f"{name} must be: {keys[name].form}", *place, name)
            else:
                found[name] = value
        return found

    def _try(self, parse: Callable[[Any], T], value: object, *place: str | int) -> T | None:
        try:
            return parse(value)
        except OffloadError as error:
            self._bad(error.message, *place, item=value)
            return None

    def _bad(self, sentence: str, *place: str | int, item: object = None) -> None:
        self.findings.append(Finding(self._place(*place, item=item), True, sentence))

    def _note(self, sentence: str, *place: str | int, item: object = None) -> None:
        self.findings.append(Finding(self._place(*place, item=item), False, sentence))

    def _place(self, *place: str | int, item: object = None) -> Place:
        """Return where something stands; an item of a list that spans lines by its own line."""
        line = self._lines.of(*place)
        if item is not None:
            shown = (f'"{item}"', f"'{item}'") if isinstance(item, str) else (str(item),)
            for number in range(line, len(self._text) + 1):
                text = self._text[number - 1]
                if any(form in text for form in shown):
                    return Place(self._file, number)
                if number > line and text.lstrip().startswith("["):
                    break
        return Place(self._file, line)


def _why_not_via(rule: Rule) -> str:
    """Return why a rule cannot be one for connectors; empty when it can."""
    if rule.via != CONNECTOR:
        return f'there is no way "{rule.via[:40]}"; via is "{CONNECTOR}", or left out'
    named = [host for host in rule.hosts if not host.wildcard]
    if rule.action is Action.DENY or len(named) < len(rule.targets):
        return "connectors serve hosts that a rule allows by their whole names"
    if rule.protocol is not Protocol.TCP:
        return "connectors carry tcp only; leave protocol out"
    return "private is for hosts without via; leave it out" if rule.private else ""


def _shown(value: object) -> str:
    return f'"{value[:40]}"' if isinstance(value, str) else str(value)[:40]


def _day(moment: datetime) -> str:
    """Return the last day of a rule."""
    return (moment - timedelta(microseconds=1)).date().isoformat()
