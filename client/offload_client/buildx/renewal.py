"""Fresh certificates for builders, before the old ones end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.buildx.builders import (
    builders_folder,
    certificate_times,
    drop_identity,
    is_half_over,
    list_builders,
    note_due,
    of_gateway,
    write_identity,
)
from offload_core.errors import GatewayUnreachableError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offload_client.buildx.builders import Builder
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation

AGAIN_SECONDS = 600.0
"""After a failure, and for certificates that a token's own end does not let live longer."""
TURN_SECONDS = 30.0
"""How long a command waits for a renewal that is under way."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Refreshed:
    """What became of one builder.

    Attributes:
        builder: that it is about.
        changed: it has another certificate than before.
        expires_at: of its certificate, seconds since 1970; 0 when there is none.
        problem: why there is no fresh one.
    """

    builder: Builder
    changed: bool
    expires_at: float
    problem: OffloadError | None = None


async def refresh(
    invocation: Invocation,
    connections: Connections,
    builders: Sequence[Builder],
    *,
    always: bool = False,
) -> list[Refreshed]:
    """Give builders the certificate of the login, renewed when half its life is over.

    Args:
        invocation: the command.
        connections: of the command.
        builders: of any gateways.
        always: renew them also earlier.
    """
    found = []
    identities: dict[str, StoredIdentity | OffloadError] = {}
    for builder in builders:
        identity = identities.get(builder.gateway)
        if identity is None:
            identity = await _identity(invocation, connections, builder.gateway, always=always)
            identities[builder.gateway] = identity
        found.append(_refreshed(invocation, builder, identity, always=always))
    note_due(invocation, not_before=time.time() + AGAIN_SECONDS)
    return found


def hand_over(invocation: Invocation, gateway: str, identity: StoredIdentity) -> None:
    """Give the builders of a gateway the certificate of a new login.

    Raises:
        ConfigError: it cannot be written.
    """
    builders = of_gateway(list_builders(invocation), gateway)
    for builder in builders:
        write_identity(invocation, builder, identity)
    if builders:
        note_due(invocation)


def take_back(invocation: Invocation, gateway: str) -> list[str]:
    """Delete the certificates of a gateway's builders; return the names of those that had one.

    Raises:
        ConfigError: one cannot be deleted.
    """
    builders = of_gateway(list_builders(invocation), gateway)
    names = [builder.name for builder in builders if drop_identity(invocation, builder)]
    if builders:
        note_due(invocation)
    return names


@contextlib.contextmanager
def alone(invocation: Invocation, *, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Let one process change certificates at a time.

    Yields False when another one still does after `wait_seconds`, or nothing can be written.
    """
    path = builders_folder(invocation) / "refresh.lock"
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        yield _locked(file, time.monotonic() + wait_seconds)
    finally:
        os.close(file)


def _locked(file: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


async def _identity(
    invocation: Invocation, connections: Connections, gateway: str, *, always: bool
) -> StoredIdentity | OffloadError:
    try:
        return await connections.identity(
            invocation, gateway, stale=(lambda _: True) if always else _is_stale
        )
    except OffloadError as error:
        return error


def _is_stale(identity: StoredIdentity) -> bool:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(identity.keys.certificate_pem)
    return is_half_over(
        certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    )


def _refreshed(
    invocation: Invocation,
    builder: Builder,
    identity: StoredIdentity | OffloadError,
    *,
    always: bool,
) -> Refreshed:
    problem = identity if isinstance(identity, OffloadError) else None
    changed = False
    if not isinstance(identity, OffloadError):
        try:
            changed = write_identity(invocation, builder, identity)
        except OffloadError as error:
            problem = error
        if problem is None and not changed and (always or _is_stale(identity)):
            # The old one still works, so that other commands go on without a word.
            problem = GatewayUnreachableError(
                f'the certificate of "{builder.name}" could not be renewed at {builder.gateway}',
                hint="try again later: offload buildx refresh",
            )
    times = certificate_times(invocation, builder)
    return Refreshed(builder, changed, times[1] if times else 0.0, problem)
