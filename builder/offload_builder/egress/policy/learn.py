"""Turns what builds reached into a proposal for an allow-list, which a person reads and applies."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_builder.egress.policy.explain import rule_toml
from offload_builder.egress.policy.learnurls import url_rule
from offload_builder.egress.policy.model import (
    Action,
    Attempt,
    HostTarget,
    Layer,
    NetworkTarget,
    Place,
    PortRange,
    Protocol,
    Rule,
    Target,
    normal_host,
    protected_range,
)
from offload_builder.egress.policy.presets import PRESETS, preset_rules
from offload_builder.egress.policy.targets import join_ports, parse_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PATTERN_NAMES = 3
"""From so many names below a domain on, the wildcard is mentioned."""

_Key = tuple[str, Protocol]
_Ports = defaultdict[_Key, set[int | None]]
_GUESSED_PORTS = (443, 80)
_PLACE = Place("learned")


def learn(
    attempts: Iterable[Attempt],
    refused: Iterable[Attempt] = (),
    *,
    with_refused: bool = False,
    by_url: bool = False,
) -> str:
    """Return a policy file, TOML, that allows what was attempted.

    Presets are named where a host of theirs was reached. Protected addresses are comments: whether
    builds may reach them is not to be learned from builds that did.

    Args:
        attempts: what was reached.
        refused: what only the posture refused; a name is refused before its port is known.
        with_refused: allow that too; otherwise its rules are comments.
        by_url: allow URLs below the first part of their path, where nothing but URLs is known of a
            server; otherwise they count as their host.
    """
    attempts = list(attempts)
    total = len(attempts)
    url_lines: list[str] = []
    if by_url:
        url_lines, attempts = url_rule(attempts)
    ports: _Ports = defaultdict(set)
    protected: Counter[str] = Counter()
    _gather(attempts, ports, protected)
    denied: _Ports = defaultdict(set)
    _gather((_guessed(item) for item in refused), denied, protected)
    known = {name for name, _ in ports}
    presets = _presets({**ports, **denied} if with_refused else ports)
    covered = _covered(presets)
    lines = [
        f"# Learned from {total} connections. Read it before you apply it:",
        "# offload-builder policy check FILE, then offload-builder policy apply FILE",
        'posture = "allowlist"',
    ]
    if presets:
        names = ", ".join(f'"{name}"' for name in presets)
        lines.append(f"presets = [{names}]")
    lines += url_lines
    for rule in _rules(_without(ports, covered), "learned"):
        lines += ["", *_hints(rule), rule_toml(rule)]
    # Of a host that was reached, a name that was refused once is old news; another port is not.
    left = {
        key: {port for port in numbers if key[0] not in known or port not in _GUESSED_PORTS}
        for key, numbers in _without(denied, covered).items()
    }
    lines += _refused({key: value - ports.get(key, set()) for key, value in left.items()},
                      live=with_refused)  # fmt: skip
    if protected:
        lines += [
            "",
            "# Not learned, because the addresses are protected; name them if you mean it:",
        ]
        lines += [f"# {what} ({count} times)" for what, count in sorted(protected.items())]
    return "\n".join(lines) + "\n"


def _gather(attempts: Iterable[Attempt], ports: _Ports, protected: Counter[str]) -> None:
    """Sort attempts by target."""
    for attempt in attempts:
        found = protected_range(attempt.address) if attempt.address is not None else None
        if found is not None:
            protected[f"{attempt}: {attempt.address} is {found.about}"] += 1
            continue
        target = normal_host(attempt.host) if attempt.host else str(attempt.address)
        ports[target, attempt.protocol].add(attempt.port)


def _guessed(attempt: Attempt) -> Attempt:
    """Return a refused name, whose port nobody saw, as one of HTTPS."""
    if attempt.host and attempt.port is None and attempt.protocol is Protocol.ANY:
        return replace(attempt, port=_GUESSED_PORTS[0], protocol=Protocol.TCP)
    return attempt


def _refused(ports: dict[_Key, set[int | None]], *, live: bool) -> list[str]:
    rules = _rules({key: value for key, value in ports.items() if value}, "refused")
    if not rules:
        return []
    about = (
        "# These were refused. The port of a name that was refused is a guess."
        if live
        else "# These were refused. Take the # away from what builds may reach; the port of a name "
        "is a guess."
    )
    lines = ["", about]
    for number, rule in enumerate(rules):
        text = rule_toml(rule).splitlines()
        lines += [""] * (live and number > 0)
        lines += text if live else [*(["#"] if number else []), *(f"# {line}" for line in text)]
    return lines


def _without(ports: _Ports, covered: _Ports) -> dict[_Key, set[int | None]]:
    left = {key: value - covered.get(key, set()) for key, value in ports.items()}
    return {key: value for key, value in left.items() if value}


def _presets(ports: Mapping[_Key, set[int | None]]) -> list[str]:
    hosts = {host for host, _ in ports}
    return [name for name, preset in PRESETS.items() if hosts & set(preset.hosts)]


def _covered(presets: list[str]) -> _Ports:
    """Return the ports that presets allow by exact hosts."""
    found: _Ports = defaultdict(set)
    for name in presets:
        for rule in preset_rules(name, _PLACE, Layer.POOL):
            for host in rule.hosts:
                if not host.wildcard:
                    found[host.name, rule.protocol].update(item.first for item in rule.ports)
    return found


def _rules(ports: dict[_Key, set[int | None]], word: str) -> list[Rule]:
    groups: dict[tuple[bool, Protocol, tuple[PortRange, ...]], list[Target]] = defaultdict(list)
    for (name, protocol), numbers in sorted(ports.items(), key=lambda item: str(item[0])):
        joined = join_ports([PortRange(port, port) for port in numbers if port is not None])
        if None in numbers:
            joined = ()
        target = parse_target(name)
        groups[isinstance(target, HostTarget), protocol, joined].append(target)
    rules: list[Rule] = []
    for (by_name, protocol, joined), targets in groups.items():
        words = [word] if by_name else [word, "addresses"]
        if protocol is not Protocol.TCP:
            words.append(protocol.value)
        words += [str(item) for item in joined]
        rule_id = "-".join(words)
        if len(rule_id) > 36:
            rule_id = "-".join(words[:2])
        taken = sum(rule.id.startswith(rule_id) for rule in rules)
        if any(rule.id == rule_id for rule in rules):
            rule_id = f"{rule_id}-n{taken + 1}"
        rules.append(Rule(rule_id, Action.ALLOW, tuple(targets), joined, protocol, place=_PLACE))
    return rules


def _hints(rule: Rule) -> list[str]:
    if any(isinstance(target, NetworkTarget) for target in rule.targets):
        return ["# Addresses that no name led to; a name is better where there is one."]
    parents = Counter(host.name.partition(".")[2] for host in rule.hosts)
    return [
        f'# "*.{parent}" would stand for {count} of these.'
        for parent, count in sorted(parents.items())
        if count >= PATTERN_NAMES and "." in parent
    ]
