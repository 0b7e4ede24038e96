"""Replaces the CA of a gateway, which may run meanwhile: `offload-builder ca`.

1. `begin` makes the new CA. Everybody who gets or renews a certificate learns to trust both.
2. When all who are logged in know it, the gateway switches: the new CA signs.
3. `finish`, when nothing that the old CA has signed is in use any more, ends the trust in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.gateway import caset
from offload_core.errors import ConfigError, UsageError
from offload_core.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.gateway.enrolments import Enrolment

NONE, PREPARED, SWITCHED = "none", "prepared", "switched"


@dataclass(frozen=True)
class Status:
    """How far a replacement is.

    Attributes:
        stage: "none", "prepared" or "switched".
        signing: fingerprint of the CA that signs.
        trusted: fingerprints of the other CAs that are trusted.
        former: how many CAs of before lead here, so that tokens that name them still work.
        rotation: its times; None when there is none.
    """

    stage: str
    signing: str
    trusted: tuple[str, ...]
    former: int
    rotation: caset.Rotation | None


def status(directory: Path) -> Status:
    """Return how far it is.

    Raises:
        ConfigError: the files cannot be read.
    """
    return _changed(directory, _status)


def begin(directory: Path, overlap_seconds: float) -> Status:
    """Make the new CA; the gateway lets it sign after some time.

    Args:
        directory: of the gateway's data.
        overlap_seconds: for how long both are trusted before the new one signs; at least as long
            as certificates of members live.

    Raises:
        UsageError: a replacement is under way.
        ConfigError: the files cannot be used.
    """

    def work(found: caset.CaSet) -> Status:
        if found.rotation is not None:
            raise UsageError(
                "the CA is being replaced already",
                hint="see how far it is with: offload-builder ca status",
            )
        now = time.time()
        caset.create_next(directory, found, caset.Rotation(now, now + overlap_seconds))
        return _status(caset.read(directory))

    return _changed(directory, work)


def abandon(directory: Path) -> Status:
    """Take the new CA back before it has signed anything.

    Raises:
        UsageError: there is none, or it signs already.
        ConfigError: the files cannot be used.
    """

    def work(found: caset.CaSet) -> Status:
        if _status(found).stage != PREPARED:
            raise UsageError("there is no new CA that does not sign yet")
        caset.drop_next(directory, found)
        return _status(caset.read(directory))

    return _changed(directory, work)


def finish(directory: Path, *, forget_tokens: bool) -> Status:
    """End the trust in the old CA.

    Args:
        directory: of the gateway's data.
        forget_tokens: also refuse tokens that name the old CA, for when its key is known to
            others.

    Raises:
        UsageError: the new CA does not sign yet.
        ConfigError: the files cannot be used.
    """

    def work(found: caset.CaSet) -> Status:
        if _status(found).stage != SWITCHED:
            raise UsageError(
                "there is no old CA: the new one has not signed anything yet",
                hint="see how far it is with: offload-builder ca status",
            )
        caset.drop_old(directory, forget_tokens=forget_tokens)
        return _status(caset.read(directory))

    return _changed(directory, work)


def reasons_to_wait(
    found: Status, member_lifetime_seconds: float, enrolments: list[Enrolment]
) -> list[str]:
    """Return why the old CA is still needed, in sentences; empty when it is not."""
    if found.rotation is None or not found.rotation.switched_at:
        return []
    switched_at, now = found.rotation.switched_at, time.time()
    waits = []
    if (left := switched_at + member_lifetime_seconds - now) > 0:
        waits.append(
            f"certificates of members that the old CA has signed live {format_duration(left)} more"
        )
    for item in enrolments:
        newest = item.renewed_at or item.created_at
        old = newest.timestamp() < switched_at and item.expires_at.timestamp() > now
        if old and item.revoked_at is None:
            waits.append(f"node {item.node_id} still has a certificate of the old CA")
    return waits


def _status(found: caset.CaSet) -> Status:
    stage = NONE
    if found.rotation is not None:
        stage = SWITCHED if found.rotation.switched_at else PREPARED
    former = len(found.links) // 2 - (stage == PREPARED)
    return Status(
        stage,
        caset.fingerprint(found.certificate),
        tuple(caset.fingerprint(item) for item in found.others),
        former,
        found.rotation,
    )


def _changed(directory: Path, work: Callable[[caset.CaSet], Status]) -> Status:
    try:
        if not (directory / "ca.pem").exists():
            raise ConfigError(f"there is no gateway's data in {directory}")
        with caset.locked(directory):
            return work(caset.read(directory))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot use the gateway's keys in {directory}: {error}") from error
