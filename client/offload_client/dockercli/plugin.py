"""`docker-offload`: what docker's CLI runs for `docker offload` and, by its alias, `docker build`.

Source: docker CLI, cli-plugins/metadata (the subcommand that tells about a plugin),
cmd/docker/builder.go (what the alias "builder" becomes), cli-plugins/socket (how the CLI tells a
plugin to end).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from offload_client.goboolean import TRUE
from offload_core import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

METADATA = "docker-cli-plugin-metadata"
HOOKS = "docker-cli-plugin-hooks"
"""What docker's CLI runs after its own commands where the user's configuration says so."""
HOOK_SECONDS = 1.0
NAME = "offload"
SOCKET = "DOCKER_CLI_PLUGIN_SOCKET"
_VALUES = {
    "--config": "DOCKER_CONFIG",
    "-c": "DOCKER_CONTEXT",
    "--context": "DOCKER_CONTEXT",
    "-H": "DOCKER_HOST",
    "--host": "DOCKER_HOST",
    "--tlscacert": "",
    "--tlscert": "",
    "--tlskey": "",
    "-l": "",
    "--log-level": "",
}
"""Docker's own flags that take a value, and the variable that says the same to us."""
_BUILDER = "--builder"
ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES"
COMMAND_PATH = "docker.cli.cobra.command_path"
BUILDX_TOO = frozenset(("stop", "use", "version"))
"""Of sessions when they are ours, of builders when they are buildx's."""


def metadata() -> str:
    """Return what docker's CLI wants to know of a plugin."""
    import json

    return json.dumps(
        {
            "SchemaVersion": "0.1.0",
            "Vendor": "offload-build",
            "Version": VERSION,
            "ShortDescription": "Build on a pool of remote builder nodes",
        }
    )


def main(arguments: Sequence[str]) -> int:
    """Run the plugin; return its exit code."""
    if list(arguments[:1]) == [METADATA]:
        sys.stdout.write(metadata() + "\n")
        return 0
    if HOOKS in arguments[:2]:
        sys.stdout.write(hook_answer())
        return 0
    words = strip_docker_flags(arguments, os.environ)
    watch_docker(os.environ)
    if words[:1] == [NAME]:
        words = words[1:]
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in ("build", "bake"):
        if wants_other_builder(rest, os.environ):
            return run_buildx(words)
        if os.environ.get("BUILDX_NO_DEFAULT_LOAD", "") not in TRUE:
            # What docker promises: the image is in the local engine afterwards.
            os.environ.setdefault("OFFLOAD_DEFAULT_LOAD", "1")
        return _build(rest if command == "build" else words)
    if command in BUILDX_TOO and is_builder_alias(os.environ):
        return run_buildx(words)
    from offload_client.cli.entry import run_offload

    if command == "status" or not command or command.startswith("-"):
        return run_offload(words)
    from offload_client.cli.offload import COMMANDS

    return run_offload(words) if command in COMMANDS else run_buildx(words)


def is_builder_alias(environment: Mapping[str, str]) -> bool:
    """Return whether `docker builder ...` was called, which the alias makes one of ours.

    Docker's CLI tells plugins what the user wrote, for their traces; one that does not (before 26)
    leaves both alike.
    """
    attributes = environment.get(ATTRIBUTES, "").split(",")
    return f"{COMMAND_PATH}=docker%20builder" in attributes


def hook_answer() -> str:
    """Return what docker's CLI shows below "What's next": that the session in use ends soon.

    Empty when there is nothing to say; a fault here is none of the command that has run.
    """
    import json

    from offload_client.invocation import Invocation
    from offload_client.sessions.faststatus import session_views
    from offload_client.sessions.statusview import urgent_news
    from offload_core.errors import OffloadError

    try:
        # After every docker command: a helper that hangs must not be felt.
        views = session_views(Invocation.of_process(()), in_use=True, timeout=HOOK_SECONDS)
    except (OffloadError, OSError):
        return ""
    news = [text for view in views if (text := urgent_news(view))]
    if not news:
        return ""
    # Go's templates begin with two braces, which a sentence of a node must not.
    text = " ".join(news).replace("{{", "{ {")
    return json.dumps({"type": 0, "template": text}) + "\n"


def _build(arguments: list[str]) -> int:
    from offload_client.resident.thin import run_in_helper

    code = run_in_helper(arguments)
    if code is None:
        from offload_client.cli.process import run_build_process

        code = run_build_process(arguments)
    return code


def strip_docker_flags(
    arguments: Sequence[str], environment: MutableMapping[str, str]
) -> list[str]:
    """Return a command line without docker's own flags, which are put into the environment."""
    words = list(arguments)
    while words and words[0].startswith("-") and words[0] not in ("--help", "-h", "--version"):
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name not in _VALUES and word[:2] in _VALUES and not word.startswith("--"):
            name, equals, value = word[:2], "=", word[2:].removeprefix("=")
        if name not in _VALUES:
            continue
        if not equals and words:
            value = words.pop(0)
        if variable := _VALUES[name]:
            environment[variable] = value
    return words


def wants_other_builder(arguments: Sequence[str], environment: MutableMapping[str, str]) -> bool:
    """Return whether the user has named a builder of buildx."""
    if environment.get("BUILDX_BUILDER"):
        return True
    for argument in arguments:
        if argument == "--":
            return False
        if argument == _BUILDER or argument.startswith(f"{_BUILDER}="):
            return True
    return False


def run_buildx(words: Sequence[str]) -> int:
    """Become the user's buildx, which does what is not ours; return only when there is none."""
    from offload_client.bake.buildxplan import find_buildx
    from offload_core.errors import OffloadError

    try:
        buildx = find_buildx(os.environ)
    except OffloadError as error:
        sys.stderr.write(f"ERROR: {error.message}\n")
        return error.exit_code
    if buildx is not None:
        sys.stdout.flush()
        os.execv(buildx, [str(buildx), *words])  # noqa: S606 - the user's own program
    what = words[0] if words else ""
    sys.stderr.write(
        f'ERROR: "{what}" is done by docker buildx, which is not installed; '
        "install it, or run 'offload uninstall'\n"
    )
    return 1


def watch_docker(environment: MutableMapping[str, str]) -> None:
    """End as by SIGTERM when docker's CLI says so, by closing its socket.

    Without a terminal the CLI alone gets the signal, and a plugin would build on.
    """
    address = environment.get(SOCKET, "")
    if not address:
        return
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # "@" stands for Linux's abstract namespace.
        connection.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        connection.close()
        return

    def wait() -> None:
        with connection:
            try:
                while connection.recv(64):
                    continue
            except OSError:
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="docker-cli", daemon=True).start()
