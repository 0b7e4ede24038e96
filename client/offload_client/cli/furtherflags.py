"""Flags of `offload-build` that few builds use; what reads their values is loaded when one is set.

Flags that docker accepts for the sake of old scripts and that BuildKit has no use for are hidden,
as docker hides them. Source: docker/buildx commands/build.go.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import click

from offload_core.errors import InvalidValueError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from offload_client.build.callrequest import CallRequest

_Function = TypeVar("_Function", bound="Callable[..., Any]")

BUILDER = (
    "--builder {name} is ignored: the build runs on a node of the pool, and which one is the "
    "gateway's choice"
)
POLICY = (
    "--policy cannot be honoured: the nodes of the pool evaluate no source policies; remove the "
    "flag, or write --policy disabled=true"
)

POLICY_VARIABLE = "EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"
"""Names a file with a policy, for buildx."""
NETWORK_VARIABLE = "OFFLOAD_NETWORK_POLICY"
"""Does what --network-policy does, where that is not given."""

LEGACY: dict[str, str] = {
    "--compress": "the context is always compressed where that helps",
    "--cpu-period": "write --resource cpu-period=VALUE",
    "--cpu-quota": "write --resource cpu-quota=VALUE",
    "--cpu-shares": "write --resource cpu-shares=VALUE",
    "--cpuset-cpus": "write --resource cpuset-cpus=VALUE",
    "--cpuset-mems": "write --resource cpuset-mems=VALUE",
    "--force-rm": "BuildKit leaves no intermediate containers",
    "--isolation": "isolation flag is deprecated with BuildKit.",
    "--memory": "write --resource memory=VALUE",
    "--memory-swap": "write --resource memory-swap=VALUE",
    "--rm": "BuildKit leaves no intermediate containers",
    "--security-opt": 'security-opt flag is deprecated. "RUN --security=insecure" should be used '
    "with BuildKit.",
    "--squash": "experimental flag squash is removed with BuildKit. You should squash inside build "
    "using a multi-stage Dockerfile for efficiency.",
}
"""Accepted without effect, as docker does, with the reason."""
WARNED = ("--isolation", "--security-opt", "--squash")
"""Those of which docker warns, in the words above."""
NOTES: dict[str, str] = {
    "--add-host": "`host-gateway` is refused: a node has none",
    "--annotation": "for images and their archives; `index` needs an index (several platforms, "
    "an attestation)",
    "--builder": "ignored with a warning: builds run in the pool, and the gateway chooses the node",
    "--build-arg": "docker's proxies come on top",
    "--call": "`--print` is its old, hidden name; of these and `--check` the last one counts",
    "--cgroup-parent": "the group is made below `/offload`, never beside the machine's own",
    "--network": "`host` asks for the entitlement `network.host` too",
    "--network-policy": "see [firewall.md](firewall.md#single-builds)",
    "--platform": "each on a node that is native for it, see [platforms.md](platforms.md); without "
    "it that of this machine, where the pool has such a node",
    "--policy": "refused: the nodes evaluate no source policies; `disabled=true` is accepted",
    "--provenance": "without it, pushed images have `mode=min,inline-only=true`, as with buildx",
    "--resource": "never lifts a bound of the node",
    "--sbom": "the node pulls the scanner's image",
}
"""What differs or is easily missed, by flag, for the documentation."""
OWN = (
    "--cache-scope", "--detach", "--gateway", "--network-policy", "--network-report",
    "--network-report-file", "--project", "--result-file", "--save", "--summary-file", "--version",
)  # fmt: skip
"""Flags that docker does not have."""
_NUMBERS = ("--cpu-period", "--cpu-quota", "--cpu-shares")
_SWITCHES = ("--compress", "--force-rm", "--rm", "--squash")
_SHORT = {"--cpu-shares": "-c", "--memory": "-m"}

_VISIBLE = (
    click.option(
        "--add-host", "add_host", multiple=True, metavar="NAME:ADDRESS",
        help='Add a custom host-to-IP mapping (format: "host:ip").',
    ),
    click.option(
        "--annotation", "annotations", multiple=True, metavar="[TYPE:]KEY=VALUE",
        help='Add annotation to the image; TYPE is for example "index" or '
        '"manifest[linux/amd64]".',
    ),
    click.option(
        "--attest", "attests", multiple=True, metavar="ATTESTATION",
        help='Attestation parameters (format: "type=sbom,generator=image").',
    ),
    click.option(
        "--builder", default="", metavar="NAME",
        help="Ignored with a warning: the gateway chooses the node.",
    ),
    click.option(
        "--call", default="build", metavar="METHOD",
        help='Set method for evaluating build ("check", "outline", "targets"), with '
        '",format=json" as JSON.',
    ),
    click.option(
        "--cgroup-parent", default="", metavar="NAME",
        help='Set the parent cgroup for the "RUN" instructions during build.',
    ),
    click.option("--check", is_flag=True, help='Shorthand for "--call=check".'),
    click.option("-D", "--debug", is_flag=True, help="Tell details; expand warnings."),
    click.option(
        "--network", default="default", metavar="MODE",
        help='Set the networking mode for the "RUN" instructions during build (default, none, '
        "host).",
    ),
    click.option(
        "--network-policy", default="", metavar="FILE|none",
        help="Let the build reach only what FILE allows too, or nothing (default: "
        "$OFFLOAD_NETWORK_POLICY); it never reaches more than pool and project allow.",
    ),
    click.option(
        "--no-cache-filter", "no_cache_filter", multiple=True, metavar="STAGE",
        help="Do not cache specified stages.",
    ),
    click.option(
        "--policy", multiple=True, metavar="POLICY",
        help='Refused, but "disabled=true": the nodes evaluate no source policies.',
    ),
    click.option(
        "--provenance", default="", metavar="VALUE",
        help='Shorthand for "--attest=type=provenance".',
    ),
    click.option(
        "--resource", "resources", multiple=True, metavar="KEY=VALUE",
        help='Bound each "RUN" instruction (memory, memory-swap, cpu-shares, cpu-quota, '
        "cpu-period, cpuset-cpus, cpuset-mems); a bound of the node is never lifted.",
    ),
    click.option(
        "--sbom", default="", metavar="VALUE", help='Shorthand for "--attest=type=sbom".'
    ),
    click.option(
        "--shm-size", "shm_size", default="", metavar="BYTES",
        help="Shared memory size for build containers.",
    ),
    click.option(
        "--ulimit", "ulimits", multiple=True, metavar="NAME=SOFT[:HARD]",
        help="Ulimit options.",
    ),
)  # fmt: skip


def further_flags(command: _Function) -> _Function:
    """Declare these flags on a command, for use below `click.command`."""
    for option in _VISIBLE:
        command = option(command)
    command = click.option(
        "--print", "print_call", default="", hidden=True, help="Old name of --call."
    )(command)
    for name, reason in LEGACY.items():
        spellings = (_SHORT[name], name) if name in _SHORT else (name,)
        form: dict[str, Any] = {"is_flag": True} if name in _SWITCHES else {"multiple": True}
        command = click.option(
            *spellings, legacy_parameter(name), hidden=True, help=reason, **form
        )(command)
    return command


def legacy_parameter(name: str) -> str:
    """Return the parameter that holds the value of a legacy flag."""
    return f"legacy_{name[2:].replace('-', '_')}"


def read_further(values: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of `BuildOptions` from the values of these flags.

    Raises:
        UsageError: a value that docker would refuse, or a flag that cannot be honoured.
    """
    from offload_client.build.stepoptions import StepOptions

    if values["no_cache"] and values["no_cache_filter"]:
        raise InvalidValueError(
            "--no-cache and --no-cache-filter cannot currently be used together"
        )
    found: dict[str, Any] = {
        "no_cache_stages": [
            stage
            for text in _texts("--no-cache-filter", values["no_cache_filter"])
            for stage in text.split(",")
            if stage
        ],
        "debug": values["debug"],
        "remarks": _remarks(values),
        "call": _call(values),
        "network_policy": values["network_policy"] or environment.get(NETWORK_VARIABLE, ""),
    }
    _check_policies(values["policy"])
    if environment.get(POLICY_VARIABLE):
        raise InvalidValueError(
            f"{POLICY_VARIABLE} cannot be honoured: the nodes of the pool evaluate no source "
            "policies; unset it to build without one"
        )
    if any(values[name] for name in ("attests", "provenance", "sbom")) or (
        "BUILDX_NO_DEFAULT_ATTESTATIONS" in environment
    ):
        from offload_client.build.attestations import parse_attestations

        found["attestations"] = parse_attestations(
            values["attests"], values["provenance"], values["sbom"], environment
        )
    if values["annotations"]:
        from offload_client.build.annotations import parse_annotations

        found["annotations"] = parse_annotations(values["annotations"])
    steps = ("add_host", "ulimits", "shm_size", "cgroup_parent", "resources")
    if values["network"] != "default" or any(values[name] for name in steps):
        from offload_client.build import flagvalues
        from offload_client.build.options import check_text

        found["steps"] = StepOptions(
            network=flagvalues.parse_network(check_text("--network", values["network"])),
            hosts=flagvalues.parse_hosts(_texts("--add-host", values["add_host"])),
            ulimits=flagvalues.parse_ulimits(_texts("--ulimit", values["ulimits"])),
            shm_size_bytes=(
                flagvalues.parse_bytes("--shm-size", values["shm_size"])
                if values["shm_size"]
                else 0
            ),
            cgroup_parent=check_text("--cgroup-parent", values["cgroup_parent"]),
            resources=flagvalues.parse_resources(_texts("--resource", values["resources"])),
        )
    return found


def _texts(flag: str, values: tuple[str, ...]) -> list[str]:
    from offload_client.build.options import check_text

    return [check_text(flag, value) for value in values]


def _call(values: Mapping[str, Any]) -> CallRequest | None:
    text = values["call"]
    if text == "build":
        return None
    from offload_client.build.callrequest import parse_call

    return parse_call(text)


def _remarks(values: Mapping[str, Any]) -> list[str]:
    for name in _NUMBERS:
        for text in values[legacy_parameter(name)]:
            if not re.fullmatch(r"[+-]?[0-9]+", text):
                shown = f"{_SHORT[name]}, {name}" if name in _SHORT else name
                raise UsageError(
                    f'invalid argument "{text}" for "{shown}" flag: it is a whole number'
                )
    remarks = [LEGACY[name] for name in WARNED if values[legacy_parameter(name)]]
    if values["builder"]:
        remarks.append(BUILDER.format(name=values["builder"]))
    return remarks


def _check_policies(values: tuple[str, ...]) -> None:
    for value in values:
        if "disabled=true" not in value.lower().replace(" ", "").split(","):
            raise InvalidValueError(POLICY)
