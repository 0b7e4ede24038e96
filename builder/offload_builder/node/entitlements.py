"""Rights that take a build step out of its isolation: who may have them.

BuildKit calls them entitlements; a build asks for them with --allow. A node grants none unless
its administrator says so (`entitlements` and `project_entitlements` in its configuration), and
untrusted members never get one. Source: BuildKit's util/entitlements.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_cache.mirror.patterns import EVERYTHING, matches
from offload_core.devices import ANY_DEVICE, DEVICE, kind_of, read_wish
from offload_core.errors import AccessDeniedError, ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_builder.node.config import NodeConfig
    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.builds_service_pb2 import Ticket

NETWORK_HOST = "network.host"
KNOWN = (NETWORK_HOST, "security.insecure", DEVICE)
UNTRUSTED_ROLE = "untrusted"
MAX_ENTITLEMENTS = 50
_REFUSALS = {
    "network.host is not allowed": NETWORK_HOST,
    "security.insecure is not allowed": "security.insecure",
    "requested by the build but not allowed": DEVICE,
    "but CDI device support is disabled": DEVICE,
}
"""What BuildKit says of a step that wants more than its build has."""
_REFUSED_DEVICE = re.compile(
    r"devices? ([A-Za-z0-9._:/=*+-]{1,256})(?:, \S+)* (?:is|are) requested by the build"
    r'|CDI device "([A-Za-z0-9._:/=*+-]{1,256})" is required'
)
_MISSING_DEVICE = re.compile(r'required device "([^"]{1,256})" is not registered')


@dataclass(frozen=True)
class Permitted:
    """What a node permits the builds of one project.

    Attributes:
        names: the rights, as the configuration says them.
        of_project: they are those of this project, not those of all.
    """

    names: tuple[str, ...] = ()
    of_project: bool = False

    @classmethod
    def of(cls, config: NodeConfig, project_id: str) -> Permitted:
        """Return what a node's configuration says of a project."""
        lists = [
            names
            for pattern, names in config.project_entitlements.items()
            if matches((pattern,), project_id)
        ]
        if not lists:
            return cls(tuple(config.entitlements))
        return cls(tuple(dict.fromkeys(name for names in lists for name in names)), True)

    @property
    def rights(self) -> tuple[str, ...]:
        """The rights without names of devices, as BuildKit's configuration takes them."""
        return tuple(dict.fromkeys(name.partition("=")[0] for name in self.names))

    @property
    def devices(self) -> tuple[str, ...]:
        """Patterns of the devices that builds may use; empty for none."""
        found = (name.partition("=") for name in self.names)
        return tuple(pattern or EVERYTHING for name, _, pattern in found if name == DEVICE)

    def permits_device(self, wanted: str) -> bool:
        """Return whether builds may use all devices that a name means."""
        if wanted == ANY_DEVICE:
            return EVERYTHING in self.devices
        kind, _, name = wanted.partition("=")
        whole_kind = "/" in kind and name in ("", "*")
        for pattern in self.devices:
            own_kind, equals, own_name = pattern.partition("=")
            if pattern == EVERYTHING:
                return True
            if not whole_kind and not ("/" in own_kind and not equals):
                if matches((pattern,), wanted):
                    return True
            elif (not equals or own_name in ("*", EVERYTHING)) and matches((own_kind,), kind):
                # A pattern for some devices of a kind is not one for all of them.
                return True
        return False


def check_configured(
    for_all: Iterable[str], for_projects: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Refuse names that BuildKit does not know.

    Raises:
        ConfigError: with the option and the name.
    """
    options = {"entitlements": for_all}
    options |= {
        f"project_entitlements: {key}": names for key, names in (for_projects or {}).items()
    }
    for option, names in options.items():
        for name in names:
            right, equals, pattern = name.partition("=")
            if right not in KNOWN or (equals and not (right == DEVICE and pattern)):
                raise ConfigError(
                    f'{option}: "{name}" is unknown; use {", ".join(KNOWN)} or device=PATTERN'
                )


def granted(spec: BuildSpec, ticket: Ticket, permitted: Permitted) -> list[str]:
    """Return the entitlements of a build, in BuildKit's form.

    Args:
        spec: the request.
        ticket: says who asks.
        permitted: by the node.

    Raises:
        UsageError: one is unknown.
        AccessDeniedError: one is not for this member or project, or not on this node.
    """
    wanted = list(dict.fromkeys(spec.entitlements))
    if spec.network_mode == "host" and NETWORK_HOST not in wanted:
        wanted.append(NETWORK_HOST)
    if len(wanted) > MAX_ENTITLEMENTS:
        raise UsageError(f"a build has at most {MAX_ENTITLEMENTS} entitlements")
    found = []
    for text in wanted:
        name, equals, _ = text.partition("=")
        if name not in KNOWN or (equals and name != DEVICE):
            raise UsageError(f"unknown entitlement {text[:100]}")
        if ticket.role == UNTRUSTED_ROLE:
            raise AccessDeniedError(
                f"--allow {name} is not for untrusted members, whatever the node permits"
            )
        if name not in permitted.rights:
            who = who_permits(name, ticket, permitted)
            raise AccessDeniedError(f"--allow {name} is refused: {who}")
        # Written anew, so that BuildKit reads nothing else in it than was checked here.
        found.append(_device(text, ticket, permitted) if name == DEVICE else name)
    return found


def _device(text: str, ticket: Ticket, permitted: Permitted) -> str:
    wish = read_wish(text)
    if not permitted.permits_device(wish.name):
        text = DEVICE if wish.name == ANY_DEVICE else f"{DEVICE}={wish.name}"
        offer = ", ".join(f"{DEVICE}={pattern}" for pattern in permitted.devices)
        raise AccessDeniedError(
            f"--allow {text} is refused: node {ticket.node_id} permits project "
            f"{ticket.project_id} only {offer}",
            hint=f"ask for what is permitted, as in --allow {DEVICE}=VENDOR/CLASS=NAME",
        )
    return wish.entitlement


def who_permits(name: str, ticket: Ticket, permitted: Permitted) -> str:
    """Return a clause that names who can allow it, and how."""
    if permitted.of_project:
        return (
            f"node {ticket.node_id} does not permit it to project {ticket.project_id}; who runs "
            f'the node can, with "{name}" for that project in project_entitlements of its '
            "configuration"
        )
    return (
        f"node {ticket.node_id} does not permit it; who runs the node can, with "
        f'entitlements = ["{name}"] in its configuration, or for project {ticket.project_id} alone '
        "with project_entitlements"
    )


def explain_refusal(message: str, ticket: Ticket, permitted: Permitted) -> str:
    """Return a sentence on a step that BuildKit refused for want of a right; empty for others."""
    for words, name in _REFUSALS.items():
        if words in message:
            if ticket.role == UNTRUSTED_ROLE:
                return f"The step needs {name}, which untrusted members never get."
            flag = name
            if name == DEVICE and (found := _REFUSED_DEVICE.search(message)) is not None:
                flag = f"{DEVICE}={found[1] or found[2]}"
            if name in permitted.rights:
                return f"Give --allow {flag} to let steps of this build have it."
            return f"The step needs --allow {flag}, but {who_permits(name, ticket, permitted)}."
    if (missing := _MISSING_DEVICE.search(message)) is not None:
        kind = kind_of(missing[1])
        return (
            f"Node {ticket.node_id} has no device {missing[1]}: give --allow {DEVICE}={kind} to be "
            'placed at a node that has one, or leave "required" out in the Dockerfile to build '
            "without."
        )
    return ""
