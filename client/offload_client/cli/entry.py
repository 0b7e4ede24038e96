"""Console scripts. Nothing is imported here that `--help` or the resident path does not need."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def build_main() -> None:
    """Run `offload-build`."""
    from offload_client.resident.thin import run_in_helper

    arguments = sys.argv[1:]
    code = run_in_helper(arguments)
    if code is None:
        from offload_client.cli.process import run_build_process

        leave(run_build_process(arguments))
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End the process at once; all its output is written.

    Taking the interpreter and gRPC apart in order costs some 20 ms and serves nobody.
    """
    import os

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            # Closed, or its reader is gone; the exit code already says what matters.
            continue
    os._exit(code)


def offload_main() -> None:
    """Run `offload`."""
    from offload_client.cli.offload import main

    sys.exit(main(sys.argv[1:]))
