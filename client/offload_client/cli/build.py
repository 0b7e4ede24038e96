"""The command `offload-build`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from offload_client.build.cacheoptions import parse_caches
from offload_client.build.options import (
    BuildOptions,
    OutputOption,
    check_iidfile,
    check_tags,
    check_text,
    parse_build_args,
    parse_build_contexts,
    parse_labels,
    parse_output,
    parse_platforms,
)
from offload_client.build.proxyargs import with_proxies
from offload_client.build.secretoptions import (
    parse_agents,
    parse_entitlements,
    parse_secrets,
)
from offload_client.cli.defaultload import with_default_load
from offload_client.cli.flags import FlagSyntax
from offload_client.cli.furtherflags import further_flags, read_further
from offload_client.cli.options import gateway_option
from offload_core import VERSION
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation

CALL, CHECK, PRINT = "--call", "--check", "--print"
"""Three ways to set one thing; of bake, --print is something else.
Source: docker/buildx commands/build.go, callAlias."""
EXAMPLES = """\b
Examples:
  offload-build .
  offload-build -t app --load .
  offload-build -t registry.example/app:1 --push .
  offload-build --network-policy none .
  offload-build -f build/Dockerfile --target test --build-arg VERSION=3 .
  offload-build -o out .
  offload-build --network-report .
  offload-build --build-context docs=../docs --build-context alpine=docker-image://alpine:3.20 .
  git archive HEAD | offload-build -
  offload-build https://git.example/app.git#main:docker
  offload-build bake --help
"""


@click.command(
    name="offload-build",
    help="Build an image from PATH on the pool of remote builder nodes.\n\n"
    'PATH is a directory, the URL of a git repository, of a tar archive or of a Dockerfile, or "-" '
    "for a tar archive or a Dockerfile on standard input.\n\n" + EXAMPLES,
    context_settings={"help_option_names": [], "max_content_width": 100},
)
@click.argument("paths", nargs=-1, metavar="PATH | URL | -")
@click.option(
    "--allow",
    "entitlements",
    multiple=True,
    metavar="ENTITLEMENT",
    help='Allow extra privileged entitlement (e.g., "network.host", "security.insecure", '
    '"device=nvidia.com/gpu=all"), if the node permits it; a node with that device builds.',
)
@click.option(
    "--build-arg",
    "build_args",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set a build-time variable; without a value it is taken from the environment.",
)
@click.option(
    "--build-context",
    "contexts",
    multiple=True,
    metavar="NAME=VALUE",
    help="Additional build context: a directory, docker-image://REF, oci-layout://PATH[:TAG], "
    "or the URL of a git repository or file.",
)
@click.option(
    "--cache-from",
    "cache_from",
    multiple=True,
    metavar="SOURCE",
    help='External cache sources (e.g. "user/app:cache", "type=local,src=path/to/dir"); '
    '"type=offload,scope=NAME" reads a further scope of the pool\'s cache, "type=none" reads '
    "nothing from it.",
)
@click.option(
    "--cache-scope",
    "cache_scope",
    default="",
    metavar="NAME",
    help="Scope of the pool's cache to read and write (default: the branch).",
)
@click.option(
    "--cache-to",
    "cache_to",
    multiple=True,
    metavar="DESTINATION",
    help='Cache export destinations (e.g. "user/app:cache", "type=local,dest=path/to/dir"); '
    '"type=none" writes nothing to the pool\'s cache.',
)
@click.option(
    "--detach",
    is_flag=True,
    help="Print the build's ID and end as soon as the build goes on by itself.",
)
@click.option(
    "-f",
    "--file",
    "file",
    default="",
    metavar="FILE",
    help='Name of the Dockerfile (default: "PATH/Dockerfile"); "-" reads it from standard input.',
)
@gateway_option
@click.option("-h", "--help", "help", is_flag=True, help="Show this message and exit.")
@click.option("--iidfile", default="", metavar="FILE", help="Write the image ID to a file.")
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="Set metadata for an image."
)
@click.option("--load", is_flag=True, help='Shorthand for "--output=type=docker".')
@click.option(
    "--metadata-file", default="", metavar="FILE", help="Write build result metadata to a file."
)
@click.option(
    "--network-report",
    is_flag=True,
    help="Tell at the end what the build reached in the network and was refused, with a proposal "
    "for a policy.",
)
@click.option(
    "--network-report-file",
    default="",
    metavar="FILE",
    help="Write the same to a file, as JSON.",
)
@click.option("--no-cache", is_flag=True, help="Do not use cache when building the image.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    metavar="OUTPUT",
    help='Output destination (format: "type=local,dest=path").',
)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    metavar="PLATFORM",
    help="Set target platform for build.",
)
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Set type of progress output (auto, none, plain, quiet, rawjson, tty); "
    "plain shows container output.",
)
@click.option(
    "--project", metavar="NAME", help="Project to build in instead of the configured one."
)
@click.option("--pull", is_flag=True, help="Always attempt to pull all referenced images.")
@click.option("--push", is_flag=True, help='Shorthand for "--output=type=registry".')
@click.option(
    "-q", "--quiet", is_flag=True, help="Suppress the build output and print image ID on success."
)
@click.option(
    "--result-file",
    default="",
    metavar="FILE",
    help="Write IDs and digest of the build to a file, as NAME=VALUE lines.",
)
@click.option(
    "--save",
    is_flag=True,
    help="Keep the image in the pool's shared store, for 'offload pull' and 'offload push'.",
)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="SECRET",
    help='Secret to expose to the build (format: "id=mysecret[,src=/local/secret|,env=NAME]").',
)
@click.option(
    "--ssh",
    "agents",
    multiple=True,
    metavar="AGENT",
    help="SSH agent socket or keys to expose to the build "
    '(format: "default|<id>[=<socket>|<key>[,<key>]]").',
)
@click.option(
    "--summary-file",
    default="",
    metavar="FILE",
    help='Write a summary in Markdown to a file; "none" for none. GitHub\'s is written unasked.',
)
@click.option(
    "-t",
    "--tag",
    "tags",
    multiple=True,
    metavar="NAME",
    help='Image identifier (format: "[registry/]repository[:tag]").',
)
@click.option("--target", default="", metavar="STAGE", help="Set the target build stage to build.")
@click.option("--version", is_flag=True, help="Show the version and exit.")
@further_flags
def build_command(**_values: Any) -> None:
    """Exist for parsing and help only; `parse_build` reads the values."""


def _long_name(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len)


# PATH, then the flags in the order of the alphabet, wherever they are declared.
build_command.params.sort(key=_long_name)


def parse_build(invocation: Invocation) -> BuildOptions | None:
    """Return the options of a command line; None when it asked for help or version, now printed.

    Raises:
        UsageError: it cannot be understood; the sentence names the flag.
    """
    arguments = flag_syntax(build_command).normalise(invocation.arguments)
    context = build_command.make_context("offload-build", arguments)
    values = context.params
    if values["help"]:
        invocation.out(build_command.get_help(context))
        return None
    if values["version"]:
        invocation.out(f"offload-build, version {VERSION}")
        return None
    return with_default_load(_options(values, invocation), invocation.environment)


def flag_syntax(command: click.Command) -> FlagSyntax:
    """Return docker's syntax with the flags of a command."""
    names: dict[str, str] = {}
    switches: set[str] = set()
    for option in command.params:
        if isinstance(option, click.Option):
            long = next(name for name in option.opts if name.startswith("--"))
            names |= dict.fromkeys(option.opts, long)
            if option.is_flag:
                switches.add(long)
    if PRINT in names and PRINT not in switches:
        names[PRINT] = CALL
    shorthands = {CHECK: f"{CALL}=check"} if CHECK in names else None
    return FlagSyntax(names, frozenset(switches), shorthands)


def _options(values: dict[str, Any], invocation: Invocation) -> BuildOptions:
    from offload_client.progress.display import parse_progress

    paths = values["paths"]
    if len(paths) != 1:
        raise InvalidValueError(
            "'offload-build' requires 1 argument",
            hint="Usage:  offload-build [OPTIONS] PATH | URL | -",
        )
    outputs = _outputs(values)
    progress = parse_progress(values["progress"])
    if values["quiet"] and values["progress"] not in ("auto", "quiet", "none"):
        raise InvalidValueError(f"progress={progress} and quiet cannot be used together")
    environment = invocation.environment
    further = read_further(values, environment)
    build_args, remark = with_proxies(
        parse_build_args(values["build_args"], environment), environment
    )
    if remark:
        further["remarks"] = [*further["remarks"], remark]
    return BuildOptions(
        path=paths[0],
        tags=check_tags(values["tags"]),
        file=values["file"],
        target=check_text("--target", values["target"]),
        build_args=build_args,
        contexts=parse_build_contexts(values["contexts"]),
        caches=parse_caches(
            [check_text("--cache-from", text) for text in values["cache_from"]],
            [check_text("--cache-to", text) for text in values["cache_to"]],
            check_text("--cache-scope", values["cache_scope"]),
            environment,
        ),
        labels=parse_labels(values["labels"]),
        platforms=parse_platforms(values["platforms"] or _default_platforms(environment)),
        no_cache=values["no_cache"],
        pull=values["pull"],
        progress="quiet" if values["quiet"] else progress,
        quiet=values["quiet"] or values["progress"] == "quiet",
        outputs=outputs,
        metadata_file=values["metadata_file"],
        summary_file=values["summary_file"],
        result_file=values["result_file"],
        network_report=values["network_report"],
        network_report_file=values["network_report_file"],
        iidfile=check_iidfile(values["iidfile"], outputs),
        secrets=parse_secrets(values["secrets"]),
        agents=parse_agents(values["agents"]),
        entitlements=parse_entitlements(values["entitlements"]),
        detach=values["detach"],
        save=values["save"],
        gateway=values["gateway"],
        project=values["project"],
        **further,
    )


def _outputs(values: dict[str, Any]) -> list[OutputOption]:
    """Return all outputs; --load and --push add one where none does that yet, as in buildx."""
    outputs = [parse_output(text) for text in values["outputs"]]
    if values["push"]:
        images = [out for out in outputs if out.type in ("image", "registry") and not out.load]
        outputs = [replace(out, type="registry") if out in images else out for out in outputs]
        if not images:
            outputs.append(OutputOption("registry"))
    if values["load"] and not any(output.load for output in outputs):
        outputs.append(OutputOption("image", load=True))
    return outputs


def _default_platforms(environment: Mapping[str, str]) -> list[str]:
    text = environment.get("DOCKER_DEFAULT_PLATFORM")
    return [text] if text else []


async def build(
    invocation: Invocation, connections: Connections, options: BuildOptions | None = None
) -> None:
    """Parse, unless that was done, and run.

    Raises:
        OffloadError: with the exit code of the command.
    """
    if options is None and invocation.arguments[:1] == ["bake"]:
        from offload_client.cli.bake import bake

        await bake(invocation, connections)
        return
    options = options or parse_build(invocation)
    if options is None:
        return
    from offload_client.build.runner import run_build

    await run_build(invocation, options, connections)
