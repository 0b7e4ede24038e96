"""--network-policy: what a build may reach at most. The gateway reads what the file says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_client.bytepipe import in_thread
from offload_core.errors import ConfigError, GatewayUnreachableError, VersionError
from offload_proto.v1.builds_service_pb2 import NetworkPolicy, Ticket

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation
    from offload_proto.v1.builds_service_pb2 import Assigned

NONE = "none"
MAX_BYTES = 64 << 10
_MAX_NAME = 200


@dataclass(frozen=True)
class PolicyFile:
    """A policy as it is sent.

    Attributes:
        file: its name, for sentences.
        text: TOML; empty for nothing.
    """

    file: str
    text: str


async def with_network_policy(invocation: Invocation, options: BuildOptions) -> BuildOptions:
    """Return options with the policy that they name.

    Raises:
        ConfigError: it cannot be read, is too long, or no text.
    """
    if not options.network_policy:
        return options
    path = invocation.cwd / options.network_policy
    value = options.network_policy
    found = await in_thread(lambda: _read(value, path), name="network-policy")
    return replace(options, policy_file=found)


def _read(value: str, path: Path) -> PolicyFile:
    if value == NONE:
        return PolicyFile("--network-policy none", "")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the network policy {value}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{value} is larger than {MAX_BYTES >> 10} KiB, which is the most for the network "
            "policy of a build"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{value} is not valid TOML: it is not UTF-8 text") from error
    # Without its folders: builds with the same policy share a BuildKit, wherever it was read.
    name = "".join(char if char.isprintable() else "?" for char in path.name)
    return PolicyFile(name[:_MAX_NAME], text)


def to_message(policy: PolicyFile) -> NetworkPolicy:
    """Return a policy for a request."""
    return NetworkPolicy(file=policy.file, text=policy.text)


def check_taken(policy: PolicyFile | None, assigned: Assigned) -> None:
    """See to it that a build never runs without the policy that it has brought.

    Raises:
        VersionError: the gateway has not passed it on, because it does not know of such.
        GatewayUnreachableError: what the gateway says is no ticket.
    """
    if policy is None:
        return
    try:
        ticket = Ticket.FromString(assigned.ticket.payload)
    except ValueError as error:
        raise GatewayUnreachableError("the gateway's ticket for the build is damaged") from error
    taken = ticket.network_policy
    named = ticket.HasField("network_policy")
    if not named or (taken.file, taken.text) != (policy.file, policy.text):
        raise VersionError(
            "the gateway is too old for --network-policy: it would have the build run without it"
        )
