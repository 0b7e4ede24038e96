"""`offload cache prune`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from offload_client.build.cibranch import build_branches
from offload_client.build.vcs import branch_and_revision
from offload_client.ci.system import in_pipeline
from offload_client.cli.options import gateway_option, project_option
from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, format_table
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.errors import UsageError
from offload_core.units import format_size, parse_duration, parse_size
from offload_proto.v1.cache_service_pb2 import PruneFilter, PruneRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.cache_service_pb2 import PruneResponse

PRUNE_SECONDS = 150.0
MAX_ANSWER_BYTES = 100
MAX_SHOWN = 50
"""Entries in the list; the sums count all."""


@click.command()
@click.option(
    "--scope", metavar="BRANCH", help="Scope to prune.  [default: that of the branch checked out]"
)
@click.option("--all-scopes", is_flag=True, help="Prune all scopes of the project.")
@click.option(
    "--unused-for",
    "--older-than",
    metavar="TIME",
    help="Only entries that were of no use to any build for so long, for example 7d.",
)
@click.option(
    "--keep-storage",
    metavar="SIZE",
    help="Keep so many bytes, for example 10GB; the longest unused entries go.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@project_option
@gateway_option
@click.pass_obj
def prune(
    invocation: Invocation,
    scope: str | None,
    unused_for: str | None,
    keep_storage: str | None,
    project: str | None,
    gateway: str | None,
    *,
    all_scopes: bool,
    dry_run: bool,
    force: bool,
) -> int:
    """Remove entries of the layer cache, after showing them and asking.

    Members prune the scopes that they may write, administrators all. Layers that no other entry
    has are freed: at once on a node without a shared store, else when their grace is over.

    \b
    Examples:
      offload cache prune --dry-run
      offload cache prune --scope feature/login --force
      offload cache prune --all-scopes --unused-for 14d --keep-storage 50GB
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)
    wanted = _filter(invocation, scope, unused_for, keep_storage, all_scopes=all_scopes)
    asking = os.isatty(invocation.stdin) and not in_pipeline(invocation.environment)
    if not (dry_run or force or asking):
        raise UsageError(
            "there is no terminal to ask on; give --force to prune, or --dry-run to look"
        )

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = PruneRequest(project_id=settings.project, filter=wanted, dry_run=True)
        found = await calls.call(calls.cache.Prune, request, timeout=PRUNE_SECONDS)
        _show(invocation, found, "Would remove" if dry_run else "To be removed")
        if dry_run or not found.result.entries:
            return
        if not force and not await _agreed(invocation):
            invocation.err("Nothing was removed.")
            return
        request.dry_run = False
        done = await calls.call(calls.cache.Prune, request, timeout=PRUNE_SECONDS)
        _warn(invocation, done)
        invocation.out(f"Deleted cache entries: {len(done.result.entries)}")
        invocation.out(f"Total reclaimed space: {format_size(done.result.freed_bytes)}")

    return run_async(invocation, run)


def _filter(
    invocation: Invocation,
    scope: str | None,
    unused_for: str | None,
    keep_storage: str | None,
    *,
    all_scopes: bool,
) -> PruneFilter:
    if scope and all_scopes:
        raise UsageError("--scope and --all-scopes exclude each other; give one of them")
    if not scope and not all_scopes:
        # The scope that a build here would write.
        checked_out, _ = branch_and_revision(invocation.cwd)
        scope, _ = build_branches(checked_out, invocation.environment)
        if not scope:
            raise UsageError("no branch is checked out here; give --scope or --all-scopes")
    wanted = PruneFilter(scope=scope or "", all_scopes=all_scopes)
    if unused_for is not None:
        wanted.unused_for.FromMilliseconds(round(parse_duration(unused_for) * 1000))
    if keep_storage is not None:
        wanted.keep_bytes = parse_size(keep_storage)
        if wanted.keep_bytes == 0:
            raise UsageError("--keep-storage 0 keeps nothing; leave it out to prune everything")
    return wanted


def _show(invocation: Invocation, found: PruneResponse, title: str) -> None:
    _warn(invocation, found)
    entries = found.result.entries
    if not entries:
        invocation.out("There is nothing to prune.")
        return
    headings = ("SCOPE", "BUILD ID", "BY", "WRITTEN", "SIZE")
    rows = [
        (
            entry.scope,
            entry.build_id or "-",
            entry.member or "-",
            ago(entry.written_at),
            format_size(entry.layer_bytes),
        )
        for entry in entries[:MAX_SHOWN]
    ]
    invocation.out(format_table(headings, rows))
    if len(entries) > MAX_SHOWN:
        invocation.out(f"... and {len(entries) - MAX_SHOWN} more")
    freed = format_size(found.result.freed_bytes)
    noun = "entry" if len(entries) == 1 else "entries"
    invocation.out(f"{title}: {len(entries)} cache {noun}; {freed} of layers nothing else needs")


def _warn(invocation: Invocation, found: PruneResponse) -> None:
    if found.silent_node_ids:
        names = ", ".join(found.silent_node_ids)
        invocation.err(f"WARNING: no answer from {names}; its own entries are left")


async def _agreed(invocation: Invocation) -> bool:
    """Ask on the terminal; anything but a yes is a no."""
    from offload_client.bytepipe import in_thread

    invocation.err("WARNING! Builds that used these entries run their steps again.")
    print("Are you sure you want to continue? [y/N] ", end="", file=invocation.stderr, flush=True)

    def read() -> str:
        return os.read(invocation.stdin, MAX_ANSWER_BYTES).decode("utf-8", "replace")

    return (await in_thread(read, name="answer")).strip().lower() in ("y", "yes")
