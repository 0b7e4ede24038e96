"""`offload diagnose`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import session_argument, settings_of
from offload_client.settings import resolve_settings
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings


@click.command()
@session_argument()
@click.option(
    "-o",
    "--output",
    "output",
    metavar="FILE",
    help="Archive to write (default: offload-diagnose-TIME.tar.gz here).",
)
@gateway_option
@click.pass_obj
def diagnose(
    invocation: Invocation, session: str | None, output: str | None, gateway: str | None
) -> int:
    """Check a session and its connections, and collect what helps to find a fault.

    Writes an archive with versions, the session's record, the log of its helper, its state at the
    gateway and at its node, the docker context, and the results of the checks. Tokens, keys,
    passwords and variables are not in it; names of the gateway, the member and nodes are.

    \b
    Examples:
      offload diagnose
      offload diagnose training -o training.tar.gz

    Exit codes: 0 also when a check failed, as the archive was written.
    """
    from offload_client.sessions.attaching import Attachments

    local = Attachments(invocation)
    record = local.chosen(session) if session or local.records() else None
    settings: Settings | None = None
    if record is not None:
        settings = settings_of(record)
    else:
        try:
            settings = resolve_settings(invocation, gateway=gateway)
        except ConfigError as error:
            invocation.err(f"WARNING: {error.message}")
    folder = f"offload-diagnose-{time.strftime('%Y%m%d-%H%M%S')}"
    path = invocation.path(output or f"{folder}.tar.gz")

    async def run(connections: Connections) -> None:
        from offload_client.sessions.diagnosis import Diagnosis, write_bundle

        diagnosis = Diagnosis(invocation, connections, local, record, settings)
        texts = await diagnosis.run()
        write_bundle(path, folder, texts)
        for problem in diagnosis.problems:
            invocation.err(problem)
        if not diagnosis.problems:
            invocation.err("All checks are well.")
        invocation.out(str(path))

    return run_async(invocation, run)
