"""`offload cache why`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.units import format_duration
from offload_proto.v1.cache_service_pb2 import StepReason, WhyRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.cache_service_pb2 import WhyResult

WHY_SECONDS = 60.0


@click.command()
@click.argument("build_id", metavar="BUILD")
@click.argument("step", metavar="[STEP]", required=False)
@gateway_option
@click.option(
    "--format", "output", type=click.Choice(("text", "json")), default="text", show_default=True
)
@click.pass_obj
def why(
    invocation: Invocation, build_id: str, step: str | None, gateway: str | None, output: str
) -> int:
    """Explain why steps of BUILD ran instead of coming from the cache.

    STEP is the number of a step as shown here, or a part of its text; all that ran if it is left
    out.
    BUILD may be the beginning of an id.

    \b
    Examples:
      offload cache why 3f9a
      offload cache why 3f9a 7
      offload cache why 3f9a "RUN make"
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = WhyRequest(build_id=build_id, step=step or "")
        result = (await calls.call(calls.cache.Why, request, timeout=WHY_SECONDS)).result
        if output == "json":
            invocation.out(json.dumps(why_json(result), indent=2))
        else:
            invocation.out(why_text(result))

    return run_async(invocation, run)


def why_text(result: WhyResult) -> str:
    """Return the explanation for people."""
    lines = [f"Build {result.build_id}"]
    if result.earlier_build_id:
        by = f" by {result.earlier_member}" if result.earlier_member else ""
        when = f", {ago(result.earlier_at)}" if result.earlier_at.seconds else ""
        lines[0] += f", compared with {result.earlier_build_id}{by}{when}"
    if not result.steps:
        lines.append("All steps came from the cache.")
    for step in result.steps:
        took = f" {_seconds(step)}" if step.HasField("took") else ""
        lines += ["", f"#{step.number} {step.name}{took}", f"   {step.explanation}"]
        lines += [f"     {detail}" for detail in step.details]
        if step.more_details:
            lines.append(f"     ... and {step.more_details} more")
    return "\n".join(lines)


def _seconds(step: StepReason) -> str:
    return format_duration(step.took.seconds + step.took.nanos / 1e9)


def why_json(result: WhyResult) -> dict[str, Any]:
    """Return the explanation for machines; field names are those of offload.v1.WhyResult."""
    return {
        "build_id": result.build_id,
        "earlier_build_id": result.earlier_build_id,
        "earlier_member": result.earlier_member,
        "earlier_at": rfc3339(result.earlier_at),
        "steps": [
            {
                "number": step.number,
                "name": step.name,
                "kind": StepReason.Kind.Name(step.kind).removeprefix("KIND_").lower(),
                "explanation": step.explanation,
                "details": list(step.details),
                "more_details": step.more_details,
                "took_seconds": round(step.took.seconds + step.took.nanos / 1e9, 3)
                if step.HasField("took")
                else None,
            }
            for step in result.steps
        ],
    }
