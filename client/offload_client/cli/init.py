"""`offload init`."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from typing import TYPE_CHECKING

import click

from offload_client.ci.scaffold import TEMPLATES, PlannedFile, plan
from offload_client.identity import load_identity
from offload_client.settings import (
    PROJECT_FILE,
    pinned_ca,
    project_file_text,
    read_project_file,
    resolve_settings,
)
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.trust import check_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.invocation import Invocation

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)


@click.command()
@click.option("--gateway", metavar="URL", help="Gateway to write; else the configured one.")
@click.option(
    "--ca",
    metavar="FINGERPRINT",
    help="Fingerprint of its CA; else that of your login. It is no secret.",
)
@click.option("--project", metavar="NAME", help="Project to write; else the configured one.")
@click.option(
    "--ci",
    "system",
    type=click.Choice(tuple(TEMPLATES)),
    help="Also write what a pipeline needs to build.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.pass_obj
def init(
    invocation: Invocation,
    gateway: str | None,
    ca: str | None,
    project: str | None,
    system: str | None,
    *,
    force: bool,
) -> int:
    """Write offload.toml, the project file, into the current directory.

    With --ci also the files of a pipeline. An offload.toml and a pipeline that are there stay, and
    what belongs into the pipeline is printed. Nothing is written when another file has another
    content, unless --force is given.

    \b
    Examples:
      offload init --gateway https://gateway.example:7443 --project shop
      offload init --ci github
    """
    path = invocation.cwd / PROJECT_FILE
    kept: dict[str, str] = {}
    given = gateway is not None or ca is not None or project is not None
    if os.path.lexists(path) and not force and system is not None and not given:
        kept = read_project_file(path)
    settings = resolve_settings(
        invocation,
        gateway=gateway or kept.get("gateway"),
        project=project or kept.get("project"),
    )
    address = f"https://{settings.gateway}"
    fingerprint = _fingerprint(invocation, settings.gateway, ca or kept.get("gateway_ca"))
    planned = []
    if not kept:
        values = {"gateway": address, "gateway_ca": fingerprint, "project": settings.project}
        planned.append(PlannedFile(path, project_file_text(values)))
    if system is not None:
        planned += plan(system, invocation.cwd, gateway=address, ca=fingerprint)
    own = [] if force else [file for file in planned if file.example and file.differs()]
    written = [file for file in planned if file not in own]
    _write(invocation, written, force=force)
    if kept:
        invocation.out(f"Kept      {PROJECT_FILE}")
    for file in own:
        name = os.path.relpath(file.path, invocation.cwd)
        invocation.out(f"Kept      {name}; take over what you need of this:\n\n{file.text}")
    for line in _advice(written, fingerprint):
        invocation.out(line)
    return 0


def _write(invocation: Invocation, planned: Sequence[PlannedFile], *, force: bool) -> None:
    def name(file: PlannedFile) -> str:
        return os.path.relpath(file.path, invocation.cwd)

    taken = [name(file) for file in planned if file.differs()]
    if taken and not force:
        raise ConfigError(
            f"nothing was written: {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} there "
            "with another content",
            hint="give --force to replace what is there",
        )
    for file in planned:
        done = "Wrote"
        if name(file) in taken:
            done = "Replaced"
        elif file.path.exists():
            done = "Unchanged"
        file.write()
        invocation.out(f"{done:<10}{name(file)}")


def _advice(planned: Sequence[PlannedFile], fingerprint: str) -> list[str]:
    examples = [file for file in planned if file.example]
    lines = []
    if examples:
        lines.append(f"Next: put the name of your image into {examples[0].path.name}.")
    if planned and not fingerprint:
        lines.append(
            "The fingerprint of the gateway's CA is not known: an administrator sees it with "
            "'offload-builder identity show'; logins by an identity provider need it."
        )
    return lines


def _fingerprint(invocation: Invocation, gateway: str, told: str | None) -> str:
    """Return the fingerprint of the gateway's CA; empty where nothing here knows it."""
    if told:
        return check_fingerprint(told)
    if pinned := pinned_ca(invocation, gateway):
        return pinned
    try:
        pem = load_identity(invocation, gateway, ended_too=True).keys.ca_pem.decode()
    except AuthenticationError:
        return ""
    found = _CERTIFICATE.search(pem)
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0])).hexdigest() if found else ""
