"""The command `offload-build bake`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from offload_client.bake.request import BakeRequest
from offload_client.bake.targetoptions import FlagParser, check_allow, target_options
from offload_client.build.remotecontext import is_remote
from offload_client.cli.build import build_command, flag_syntax, parse_build
from offload_client.cli.furtherflags import BUILDER
from offload_client.cli.options import gateway_option
from offload_client.goboolean import parse_boolean
from offload_core.errors import InternalError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.build.options import BuildOptions
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation

NAME = "bake"
EXAMPLES = """\b
Examples:
  offload-build bake
  offload-build bake app tests
  offload-build bake -f compose.yaml --load
  offload-build bake --print --set '*.platform=linux/arm64' release
  offload-build bake --list targets
"""


@click.command(
    name="offload-build bake",
    help="Build the targets of a bake file or compose file on the pool, in parallel.\n\n"
    'Without a TARGET that is the group or target "default". The files are those of docker buildx '
    "bake.\n\n" + EXAMPLES,
    context_settings={"help_option_names": [], "max_content_width": 100},
)
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@click.option(
    "--allow",
    "allow",
    multiple=True,
    metavar="ENTITLEMENT",
    help="Let targets have an entitlement that their file wants (e.g. network.host).",
)
@click.option(
    "--builder",
    default="",
    metavar="NAME",
    help="Ignored with a warning: the gateway chooses the nodes.",
)
@click.option(
    "--call",
    "call",
    default="",
    metavar="METHOD",
    help="Ask about the targets instead of building them (check, outline, targets).",
)
@click.option("--check", is_flag=True, help='Shorthand for "--call=check".')
@click.option("-D", "--debug", is_flag=True, help="Tell details; expand warnings.")
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help='Bake file in HCL or JSON, or compose file; "-" for standard input.',
)
@gateway_option
@click.option("-h", "--help", "help", is_flag=True, help="Show this message and exit.")
@click.option("--list", "listed", default="", metavar="KIND", help="List targets or variables.")
@click.option(
    "--load", is_flag=True, help='Shorthand for "--set=*.output=type=docker", where nothing says '
    "otherwise.",
)  # fmt: skip
@click.option(
    "--metadata-file", default="", metavar="FILE", help="Write build result metadata to a file."
)
@click.option(
    "--network-policy",
    default="",
    metavar="FILE|none",
    help="Let the builds reach only what FILE allows too, or nothing.",
)
@click.option("--no-cache", is_flag=True, help="Do not use cache when building the images.")
@click.option(
    "--print", "shown", is_flag=True, help="Print what would be built, without building it."
)
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Set type of progress output (auto, none, plain, quiet, rawjson, tty).",
)
@click.option(
    "--project", metavar="NAME", help="Project to build in instead of the configured one."
)
@click.option(
    "--provenance",
    default="",
    metavar="VALUE",
    help='Shorthand for "--set=*.attest=type=provenance".',
)
@click.option("--pull", is_flag=True, help="Always attempt to pull all referenced images.")
@click.option(
    "--push", is_flag=True, help='Shorthand for "--set=*.output=type=registry", where nothing '
    "says otherwise.",
)  # fmt: skip
@click.option(
    "--sbom", default="", metavar="VALUE", help='Shorthand for "--set=*.attest=type=sbom".'
)
@click.option(
    "--summary-file",
    default="",
    metavar="FILE",
    help='Write a summary in Markdown to a file; "none" for none. GitHub\'s is written unasked.',
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TARGET.KEY=VALUE",
    help="Set a field of the targets that match a pattern.",
)
def bake_command(**_values: Any) -> None:
    """Exist for parsing and help only; `parse_bake` reads the values."""


def parse_bake(invocation: Invocation) -> BakeRequest | None:
    """Return what a command line asks for; None when it asked for help, which is now printed.

    Raises:
        UsageError: it cannot be understood; the sentence names the flag.
    """
    from offload_client.progress.display import parse_progress

    words = list(invocation.arguments)[1:]
    context = bake_command.make_context(
        "offload-build bake", flag_syntax(bake_command).normalise(words)
    )
    values = context.params
    if values["help"]:
        invocation.out(bake_command.get_help(context))
        return None
    targets = list(values["targets"]) or ["default"]
    if is_remote(targets[0]):
        raise InvalidValueError(
            f'"{targets[0]}" is a remote bake definition, which is not supported',
            hint="clone the repository, and run the command in it",
        )
    check_allow(values["allow"])
    return BakeRequest(
        targets=targets,
        files=values["files"],
        overrides=values["overrides"],
        allow=values["allow"],
        shown=values["shown"],
        listed=values["listed"],
        load=values["load"],
        push=values["push"],
        no_cache=_switch("--no-cache", values["no_cache"], words),
        pull=_switch("--pull", values["pull"], words),
        provenance=values["provenance"],
        sbom=values["sbom"],
        call=values["call"],
        debug=values["debug"],
        remarks=[BUILDER.format(name=values["builder"])] if values["builder"] else [],
        progress=parse_progress(values["progress"]),
        metadata_file=values["metadata_file"],
        summary_file=values["summary_file"],
        network_policy=values["network_policy"],
        gateway=values["gateway"],
        project=values["project"],
    )


def _switch(flag: str, on: bool, words: Sequence[str]) -> bool | None:
    """Return a switch that also overrides what targets say when it is turned off."""
    if on:
        return True
    given = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return False if given and parse_boolean(given[-1]) is False else None


async def bake(invocation: Invocation, connections: Connections) -> None:
    """Parse and run.

    Raises:
        OffloadError: with the exit code of the command.
    """
    request = parse_bake(invocation)
    if request is None:
        return
    from offload_client.bake.planning import list_text, make_plan
    from offload_client.bytepipe import in_thread

    if request.listed:
        text = await in_thread(lambda: list_text(invocation, request), name="bake-list")
        invocation.out(text)
        return
    plan = await in_thread(lambda: make_plan(invocation, request), name="bake-plan")
    if request.shown:
        invocation.out(plan.document())
        return
    parser = flag_parser(invocation)
    options = {
        name: target_options(name, fields, request, parser) for name, fields in plan.targets.items()
    }
    if any(one.network_policy for one in options.values()):
        from offload_client.build.networkpolicy import with_network_policy

        options = {
            name: await with_network_policy(invocation, one) for name, one in options.items()
        }
    for remark in request.remarks:
        invocation.err(f"WARNING: {remark}")
    from offload_client.bake.bakerun import BakeRun

    await BakeRun(invocation, request, plan, options, connections).run()


def flag_parser(invocation: Invocation) -> FlagParser:
    """Return how command lines of `offload-build` are read."""

    def parse(arguments: Sequence[str]) -> BuildOptions:
        options = parse_build(replace(invocation, arguments=arguments))
        if options is None:
            raise InternalError("a bake target has asked for help")
        return options

    flags = {
        name
        for option in build_command.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    return FlagParser(flags, parse)
