"""Console scripts. Nothing is imported here that `--help` or the resident path does not need."""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# What gRPC logs of a refused connection is in our sentence; whoever wants more sets it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


INTERRUPTED = 130
"""What a shell shows for a process that SIGINT has ended."""


def build_main() -> None:
    """Run `offload-build`."""
    try:
        code = _build(sys.argv[1:])
    except KeyboardInterrupt:
        # Before the command has said what an interrupt means to it, or after that.
        code = INTERRUPTED
    _end(code)


def _build(arguments: list[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        from offload_client.cli.readyhelp import print_ready_help

        if print_ready_help():
            return 0
    from offload_client.resident.thin import run_in_helper

    code = run_in_helper(arguments)
    if code is None:
        from offload_client.cli.process import run_build_process

        code = run_build_process(arguments)
    return code


def docker_main() -> None:
    """Run `docker-offload`, the plugin of docker's CLI."""
    try:
        from offload_client.dockercli.plugin import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    _end(code)


def offload_main() -> None:
    """Run `offload`."""
    try:
        code = run_offload(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    _end(code)


def run_offload(arguments: list[str]) -> int:
    """Run a command line of `offload`; return its exit code."""
    if arguments[:1] == ["status"]:
        from offload_client.sessions.faststatus import fast_status

        code = fast_status(arguments[1:])
        if code is not None:
            return code
    if arguments[:1] == ["start"] and not {"-h", "--help"} & set(arguments):
        # Its helper needs as long to begin as the rest of the command does.
        from offload_client.invocation import Invocation
        from offload_client.sessions.helperprocess import early_helper
        from offload_client.sessions.records import RECORD_FILE, sessions_directory

        invocation = Invocation.of_process(arguments)
        folder = sessions_directory(invocation)
        for name in ("default", *arguments[1:]):
            # Perhaps it runs already. What cannot be a name is no error here.
            if os.path.exists(f"{folder}/{name}/{RECORD_FILE}"):  # noqa: PTH110
                return _run_offload(arguments)
        with early_helper(folder, invocation.environment, invocation.cwd):
            return _run_offload(arguments)
    return _run_offload(arguments)


def _run_offload(arguments: list[str]) -> int:
    from offload_client.cli.offload import main

    return main(arguments)


def _end(code: int) -> NoReturn:
    """Leave with an exit code; certificates of builders that are due are renewed afterwards."""
    try:
        due = os.stat(f"{_config_folder()}/buildx/due").st_mtime  # noqa: PTH116 - no imports here
    except OSError:
        sys.exit(code)
    if due <= time.time():
        from offload_client.buildx.background import start_refresh

        start_refresh({**os.environ, "OFFLOAD_CONFIG_DIR": os.path.abspath(_config_folder())})  # noqa: PTH100
    sys.exit(code)


def _config_folder() -> str:
    """Return what `Invocation.config_dir` finds, without its imports."""
    environment = os.environ
    if directory := environment.get("OFFLOAD_CONFIG_DIR"):
        return os.path.expanduser(directory)  # noqa: PTH111
    base = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME') or ''}/.config"
    return f"{base}/offload"
