"""Rights that take a build step out of its isolation: who may have them.

BuildKit calls them entitlements; a build asks for them with --allow. A node grants none unless
its administrator says so (`entitlements` and `project_entitlements` in its configuration), and
untrusted members never get one. Source: BuildKit's util/entitlements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_cache.mirror.patterns import matches
from offload_core.errors import AccessDeniedError, ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_builder.node.config import NodeConfig
    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.builds_service_pb2 import Ticket

NETWORK_HOST = "network.host"
DEVICE = "device"
KNOWN = (NETWORK_HOST, "security.insecure", DEVICE)
UNTRUSTED_ROLE = "untrusted"
MAX_ENTITLEMENTS = 50
_REFUSALS = {
    "network.host is not allowed": NETWORK_HOST,
    "security.insecure is not allowed": "security.insecure",
    "requested by the build but not allowed": DEVICE,
}
"""What BuildKit says of a step that wants more than its build has."""


@dataclass(frozen=True)
class Permitted:
    """What a node permits the builds of one project.

    Attributes:
        names: the rights.
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
            if name not in KNOWN:
                raise ConfigError(f'{option}: "{name}" is unknown; use {", ".join(KNOWN)}')


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
    for text in wanted:
        name, equals, _ = text.partition("=")
        if name not in KNOWN or (equals and name != DEVICE):
            raise UsageError(f"unknown entitlement {text[:100]}")
        if ticket.role == UNTRUSTED_ROLE:
            raise AccessDeniedError(
                f"--allow {name} is not for untrusted members, whatever the node permits"
            )
        if name not in permitted.names:
            who = who_permits(name, ticket, permitted)
            raise AccessDeniedError(f"--allow {name} is refused: {who}")
    return wanted


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
            if name in permitted.names:
                return f"Give --allow {name} to let steps of this build have it."
            return f"The step needs --allow {name}, but {who_permits(name, ticket, permitted)}."
    return ""
