"""The keys of a policy file, in one place for its reader and for the documentation."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from offload_builder.egress.policy.model import Layer

POOL, PROJECT, BUILD = Layer.POOL, Layer.PROJECT, Layer.BUILD


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        kinds: types of its value in TOML.
        form: of the value, for people.
        about: one sentence.
        layers: whose files may have it.
        default: for people; empty when there is none.
    """

    kinds: tuple[type, ...]
    form: str
    about: str
    layers: tuple[Layer, ...] = (POOL, PROJECT, BUILD)
    default: str = ""


TOP_KEYS = {
    "pool": Key((str,), "text", "Name of the pool, for sentences.", (POOL,), "none"),
    "posture": Key(
        (str,), "`open` or `allowlist`",
        "What happens with what no rule matches; required for a pool. A project may only tighten.",
        default="pool's; `allowlist` for a build",
    ),
    "contact": Key((str,), "text", "Whom to ask for more; shown with refusals.", default="none"),
    "presets": Key(
        (list,), "list of texts", "Sets of hosts that are allowed, by name.", default="none"
    ),
    "projects_may_allow": Key(
        (str, list), "`nothing`, `public`, or list of targets",
        "What projects may allow by themselves: any public destination, or these targets.",
        (POOL,), "`nothing`",
    ),
    "proxied": Key(
        (bool,), "true or false",
        "Steps reach HTTP and HTTPS only, through BuildKit's proxy, and are judged by URL; see "
        "[egress-urls.md](egress-urls.md). A project may turn it on for itself. A file with URLs "
        "as targets needs it.",
        (POOL, PROJECT), "false",
    ),
    "check_names": Key(
        (bool,), "true or false",
        "Under `allowlist`, TLS and HTTP to addresses of names must ask for a name that is allowed "
        "there; see [names within connections](#names-within-connections).",
        (POOL,), "true",
    ),
    "rule": Key((list,), "tables", "One table [[rule]] for each rule; deny wins over allow."),
}  # fmt: skip
RULE_KEYS = {
    "id": Key((str,), "text", "Shown with refusals and in counters; unique in the file."),
    "allow": Key(
        (list,), "list of targets", "Hosts, `*.domain`, addresses, networks or URLs to be reached."
    ),
    "deny": Key((list,), "list of targets", "The same, never to be reached."),
    "ports": Key(
        (list,), "list of ports", 'Ports of the destination, such as 443 or "8000-8100".',
        default="all",
    ),
    "protocol": Key(
        (str,), "`tcp`, `udp`, `icmp` or `any`", "What is spoken.",
        default="`tcp` to allow, `any` to deny",
    ),
    "private": Key(
        (bool,), "true or false", "The hosts of this rule may lead to private addresses.",
        default="false",
    ),
    "via": Key(
        (str,), "`connector`",
        "The hosts of this rule are reached through a connector only, see "
        "[connector.md](connector.md), and never in the ordinary way.",
        (POOL, PROJECT), "the network of the node",
    ),
    "comment": Key((str,), "text", "Why there is the rule.", default="none"),
    "owner": Key((str,), "text", "Whom to ask about the rule.", default="none"),
    "expires": Key(
        (datetime.date,), "date or time", "The rule counts to the end of this day, UTC.",
        default="never",
    ),
}  # fmt: skip
