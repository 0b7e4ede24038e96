"""`offload-builder ca`: replace the gateway's certificate authority while everything runs."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_options,
    gateway_records,
    load_gateway_config,
    operator,
)
from offload_builder.cli.tables import format_option, print_record

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.carotation import Status
    from offload_builder.gateway.config import GatewayConfig


@click.group("ca")
def ca() -> None:
    """Replace the certificate authority of a gateway without an outage.

    \b
    Steps:
      offload-builder ca rotate     the new CA is made, all learn to trust it
      offload-builder ca status     until the new one signs, and the old one is not needed
      offload-builder ca finish     the old CA is trusted no longer
    """


@ca.command("rotate")
@gateway_options
@click.option(
    "--overlap",
    metavar="DURATION",
    help="After how long the new CA signs; by default as long as certificates of members live.",
)
@click.option("--abandon", is_flag=True, help="Take a new CA back that does not sign yet.")
@format_option
def rotate(
    overlap: str | None,
    abandon: bool,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Make a new CA beside the old one; both are trusted from now on.

    The gateway takes it over within seconds and lets it sign after the overlap, when every node
    that is there knows it.
    """
    from offload_builder.gateway import carotation
    from offload_core.units import parse_duration

    config = load_gateway_config(config_file, data_dir=data_dir)
    if abandon:
        found, action = carotation.abandon(config.data_dir), "ca.abandoned"
    else:
        seconds = parse_duration(overlap) if overlap else config.member_certificate_lifetime
        found, action = carotation.begin(config.data_dir, seconds), "ca.rotated"
    asyncio.run(_note(config, action, f"{found.signing[:16]} signs"))
    _print(found, [], output_format)


@ca.command("status")
@gateway_options
@format_option
def status(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """Say which CAs there are, how far a replacement is, and what it waits for."""
    from offload_builder.gateway import carotation

    config = load_gateway_config(config_file, data_dir=data_dir)
    found = carotation.status(config.data_dir)
    _print(found, asyncio.run(_waits(config, found)), output_format)


@ca.command("finish")
@gateway_options
@click.option(
    "--forget-tokens",
    is_flag=True,
    help="Refuse tokens that name a former CA; for when its key is known to others.",
)
@click.option("--force", is_flag=True, help="Do not wait for what still needs the old CA.")
@format_option
def finish(
    forget_tokens: bool,
    force: bool,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """End the trust in the old CA.

    Who still has a certificate of it only must log in or be enrolled again.
    """
    from offload_builder.gateway import carotation
    from offload_core.errors import UsageError

    config = load_gateway_config(config_file, data_dir=data_dir)
    waits = asyncio.run(_waits(config, carotation.status(config.data_dir)))
    if waits and not force:
        raise UsageError(
            f"the old CA is still needed: {'; '.join(waits)}",
            hint="try again later, or do not wait with --force",
        )
    found = carotation.finish(config.data_dir, forget_tokens=forget_tokens)
    asyncio.run(_note(config, "ca.finished", f"{found.signing[:16]} signs"))
    _print(found, [], output_format)


async def _note(config: GatewayConfig, action: str, detail: str) -> None:
    from offload_builder.gateway.audit import Event

    async with gateway_records(config) as (_, audit):
        await audit.write(Event(action, **operator(), detail=detail))


async def _waits(config: GatewayConfig, found: Status) -> list[str]:
    from offload_builder.gateway.carotation import reasons_to_wait

    async with gateway_records(config) as (members, _):
        enrolments = await members.enrolments.all()
    return reasons_to_wait(found, config.member_certificate_lifetime, enrolments)


def _print(found: Status, waits: list[str], output_format: str) -> None:
    times = found.rotation
    record = {
        "stage": found.stage,
        "signs": found.signing,
        "trusted": list(found.trusted),
        "former": found.former,
        "started_at": _time(times.started_at) if times else None,
        "switch_at": _time(times.switch_at) if times else None,
        "switched_at": _time(times.switched_at) if times else None,
        "waits_for": waits,
    }
    if output_format == "json":
        print_record(record)
        return
    print(f"Stage      {found.stage}")
    print(f"Signs      {found.signing}")
    for fingerprint in found.trusted:
        print(f"Trusted    {fingerprint}")
    if found.former:
        print(f"Former     {found.former}, whose tokens still work")
    if times is not None and not times.switched_at:
        print(f"Switch     {_time(times.switch_at)}, when all nodes know the new CA")
    if times is not None and times.switched_at:
        print(f"Switched   {_time(times.switched_at)}")
        print(f"Finish     {'not yet' if waits else 'possible: offload-builder ca finish'}")
    for sentence in waits:
        print(f"  {sentence}", file=sys.stdout)


def _time(seconds: float) -> str | None:
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
