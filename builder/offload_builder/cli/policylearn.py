"""`offload-builder policy learn`: an allow-list for what builds reached."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import gateway_options, gateway_store, load_gateway_config
from offload_builder.cli.inputfile import read_input
from offload_builder.cli.since import parse_since

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from offload_builder.egress.policy.model import Attempt
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egresslearning import Learned

MAX_INPUT_BYTES = 64 << 20
_BUILD = re.compile(r"[a-z2-7]{1,12}")


@click.command("learn")
@gateway_options
@click.argument("sources", metavar="[BUILD|FILE]...", nargs=-1)
@click.option("--project", "project_id", metavar="NAME", default="", help="Builds of one project.")
@click.option("--since", metavar="TIME", help="From when on: 2h, 7d, or 2026-01-31T12:00.")
@click.option(
    "--with-refused",
    is_flag=True,
    help="Allow what was refused as well, where no rule denies it; else it is in comments.",
)
@click.option("--urls", is_flag=True, help="Allow URLs below their first part, not whole hosts.")
def learn(
    sources: tuple[str, ...],
    project_id: str,
    since: str | None,
    with_refused: bool,
    urls: bool,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Print an allow-list for what builds reached, to be read by a person and applied.

    Builds are those named, or the newest 500 of the history with --project, --since or both. A
    FILE has one JSON object per line with host, address, port and protocol, or a URL, as reports
    of builds have them; - is standard input.

    \b
    Examples:
      offload-builder policy learn --project shop --since 7d > shop.toml
      offload-builder policy learn 3f9a77c2 --with-refused
      offload-builder policy learn report.jsonl > policy.toml
    """
    from offload_builder.egress.policy.learn import learn as proposal
    from offload_builder.gateway.networkuses import attempts
    from offload_core.errors import UsageError

    files = [item for item in sources if not _BUILD.fullmatch(item) or Path(item).exists()]
    builds = [source for source in sources if source not in files]
    if not (files or builds or project_id or since):
        raise UsageError("name builds or a file, or say which builds: --project, --since")
    if sources and since:
        raise UsageError("--since is for builds of the history, without naming any")
    reached: list[Attempt] = []
    refused: list[Attempt] = []
    for file in files:
        reached += _attempts(read_input(Path(file), MAX_INPUT_BYTES))
    if builds or not files:
        config = load_gateway_config(config_file, data_dir=data_dir)
        learned = asyncio.run(_learned(config, builds, project_id, parse_since(since)))
        print(f"read {learned.builds} builds", file=sys.stderr)
        more, refused = attempts(item.use for item in learned.uses)
        reached += more
    sys.stdout.write(proposal(reached, refused, with_refused=with_refused, by_url=urls))


async def _learned(
    config: GatewayConfig, builds: list[str], project_id: str, since: datetime | None
) -> Learned:
    """Read the history.

    Raises:
        NotFoundError: there is no such build.
    """
    from offload_builder.gateway.egresslearning import EgressLearning
    from offload_builder.gateway.history import History
    from offload_builder.gateway.log_book import LogBook

    async with gateway_store(config) as store:
        learning = EgressLearning(store, LogBook(store, config.max_log_bytes_per_build))
        projects = (project_id,) if project_id else ()
        found: list[str] = []
        for prefix in builds:
            record = await History(store).resolve(prefix, projects)
            found.append(record.build_id)
            if record.group_id:
                found += await learning.parts(record.group_id, record.project_id)
        if not builds:
            found = await learning.recent(projects, since)
        return await learning.of_builds(found)


def _attempts(data: bytes) -> Iterator[Attempt]:
    from offload_builder.egress.policy.model import Attempt, Protocol
    from offload_builder.egress.policy.targets import parse_host, parse_ports
    from offload_builder.egress.urls.locations import OddSourceError
    from offload_core.errors import OffloadError, UsageError

    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            if url := raw.get("url"):
                yield _of_url(str(url))
                continue
            host, address, port = raw.get("host"), raw.get("address"), raw.get("port")
            if not host and not address:
                raise UsageError("neither a host nor an address")
            yield Attempt(
                parse_host(host) if host else None,
                ipaddress.ip_address(address) if address else None,
                parse_ports(port).first if port is not None else None,
                Protocol(raw.get("protocol", "tcp")),
            )
        except (ValueError, AttributeError, OffloadError, OddSourceError) as error:
            raise UsageError(f"line {number} is not a connection: {error}") from error


def _of_url(url: str) -> Attempt:
    from offload_builder.gateway.networkuses import attempt_of
    from offload_core.errors import UsageError
    from offload_proto.v1.events_pb2 import EgressUse

    found = attempt_of(EgressUse(url=url))
    if found is None:
        raise UsageError("its URL leads nowhere")
    return found
