"""Console scripts. Nothing is imported here that `--help` or the resident path does not need."""

from __future__ import annotations

import sys


def build_main() -> None:
    """Run `offload-build`."""
    from offload_client.resident.thin import run_in_helper

    arguments = sys.argv[1:]
    code = run_in_helper(arguments)
    if code is None:
        from offload_client.cli.process import run_build_process

        code = run_build_process(arguments)
    sys.exit(code)


def offload_main() -> None:
    """Run `offload`."""
    from offload_client.cli.offload import main

    sys.exit(main(sys.argv[1:]))
