"""Disk usage, prune and history of one project, as its members may have them.

A BuildKit serves one project and trust domain, so what it lists belongs to people who share it
anyway. What a member deletes would be missing to the others: see `PRUNE_SPARES_SECONDS`.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from offload_builder.buildkit.controlapi import history_change, limited_prune
from offload_core.errors import AccessDeniedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.node.proxy.admission import Guest

PRUNE_SPARES_SECONDS = 7 * 86_400.0
"""A member's prune spares what anybody in the project has used in so long."""
DISK_USAGE = "/moby.buildkit.v1.Control/DiskUsage"
PRUNE = "/moby.buildkit.v1.Control/Prune"
LISTEN_HISTORY = "/moby.buildkit.v1.Control/ListenBuildHistory"
CHANGE_HISTORY = "/moby.buildkit.v1.Control/UpdateBuildHistory"
METHODS = frozenset((DISK_USAGE, PRUNE, LISTEN_HISTORY, CHANGE_HISTORY))
_OWN_DOMAIN = "untrusted-"


def permitted(method: str, request: bytes, guest: Guest, own_refs: Iterable[str]) -> bytes:
    """Return the request as BuildKit gets it.

    Args:
        method: one of `METHODS`.
        request: as the client has sent it.
        guest: who it is.
        own_refs: names of builds that this member has run at this node.

    Raises:
        AccessDeniedError: the member may not do this.
        UsageError: the request cannot be read.
    """
    alone = guest.role == "admin" or guest.trust_domain.startswith(_OWN_DOMAIN)
    if method == PRUNE and not alone:
        return limited_prune(request, PRUNE_SPARES_SECONDS)
    if method == CHANGE_HISTORY and not alone:
        ref, is_change = history_change(request)
        if is_change and ref not in own_refs:
            raise AccessDeniedError(
                "only an administrator may remove or pin records of other members' builds; "
                "your own can be removed until the node restarts"
            )
    return request


async def answers(
    client: BuildkitClient,
    method: str,
    request: bytes,
    secrets: Callable[[], Iterable[str]],
    repeats: Callable[[], Mapping[str, str]],
) -> AsyncGenerator[bytes]:
    """Yield the messages that BuildKit answers, without what nobody may see.

    Args:
        client: to BuildKit.
        method: one of `METHODS`.
        request: see `permitted`.
        secrets: returns the capabilities in force; builds begin while messages come. What takes
            their place is as long as they are, so that the messages stay what they are.
        repeats: returns BuildKit's names of builds by those of their clients, which are as long.

    Raises:
        GrpcError: BuildKit refuses.
    """
    for ref, repeated in repeats().items():
        request = request.replace(ref.encode(), repeated.encode())
    async with aclosing(client.passed_on(method, request)) as messages:
        async for message in messages:
            shown = message
            for secret in secrets():
                shown = shown.replace(secret.encode(), b"*" * len(secret))
            for ref, repeated in repeats().items():
                shown = shown.replace(repeated.encode(), ref.encode())
            yield shown
