"""What `offload-builder policy` prints of rules, changes and versions."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from offload_builder.cli.policynodes import outcome_record, print_outcome, wait_for_nodes
from offload_builder.cli.tables import print_record, print_records

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.egress.policy.differences import Change
    from offload_builder.egress.policy.model import Rule
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egresspolicies import Applied


def rule_row(rule: Rule) -> dict[str, object]:
    """Return a rule for `print_records`."""
    return {
        "rule": rule.id,
        "does": str(rule),
        "layer": rule.layer.value,
        "place": str(rule.place),
        "preset": rule.preset,
        "comment": rule.comment,
        "owner": rule.owner,
        "expires": rule.expires,
    }


def finish(
    config: GatewayConfig, project_id: str, applied: Applied, output_format: str, wait: float | None
) -> None:
    """Say what came of a policy; `wait` is None where it was only tried."""
    for item in applied.warnings:
        print(item, file=sys.stderr)
    version = applied.version
    if output_format == "json":
        record: dict[str, object] = {
            "version": version,
            "changes": [change.record() for change in applied.changes],
            "warnings": [str(item) for item in applied.warnings],
        }
        if wait is not None:
            found = asyncio.run(wait_for_nodes(config, project_id, version, wait))
            record["nodes"] = outcome_record(found, project_id, version)
        print_record(record)
        return
    print_changes(applied.changes, output_format)
    print(f"Version {version} holds" + ("" if wait is not None else " still"), flush=True)
    if wait is not None:
        found = asyncio.run(wait_for_nodes(config, project_id, version, wait))
        print_outcome(found, project_id, version)


def print_changes(changes: Iterable[Change], output_format: str) -> None:
    """Print differences between two policies."""
    found = list(changes)
    if output_format == "json":
        print_records([change.record() for change in found], output_format, ())
        return
    print("\n".join(str(change) for change in found) or "No rule changes")
