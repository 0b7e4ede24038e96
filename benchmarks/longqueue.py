"""Stock docker buildx in a queue of ten minutes: `python -m benchmarks.longqueue`; needs root.

Not a benchmark but a proof that takes its time: no deadline of the client ends the wait, and the
build works when its turn has come. A node with one slot is kept busy for so long by another build.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.fixtures.buildx import Buildx, finished, until_output
from tests.fixtures.node import NodePool

QUEUE_SECONDS = 620.0
MARGIN_SECONDS = 60.0
MAX_AFTER_SECONDS = 15.0


async def wait_in_queue(seconds: float) -> str:
    """Let buildx wait for so long; return in one sentence what came of it.

    Raises:
        AssertionError: the build failed, or did not wait.
    """
    async with NodePool() as pool:
        await pool.start_node(slots=1)
        async with Buildx(pool.gateway.address, pool.keys) as user:
            user.dockerfile(f"RUN sleep {seconds:.0f}\n")
            busy = await user.start("build", "--progress", "plain", ".")
            await until_output(busy, "RUN sleep")
            began = time.monotonic()
            user.dockerfile("RUN echo its-turn\n", "Dockerfile.waits")
            waiting = await user.start(
                "build", "--progress", "plain", "-f", "Dockerfile.waits", "."
            )
            shown = await until_output(waiting, "queue position 1")
            visible = time.monotonic() - began
            first = asyncio.ensure_future(finished(busy, seconds + MARGIN_SECONDS))
            result = await finished(waiting, seconds + MARGIN_SECONDS)
            waited = time.monotonic() - began
            shown += result.output
            assert result.code == 0, shown
            assert (await first).code == 0
            assert seconds - MARGIN_SECONDS < waited < seconds + MAX_AFTER_SECONDS, waited
            lines = shown.count("(waiting for ")
            return (
                f"waited {waited:.0f} s in the queue (visible after {visible:.1f} s, "
                f"{lines} lines of waiting), exit code {result.code}"
            )


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longqueue", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=QUEUE_SECONDS, metavar="N", help="how long it waits"
    )
    print(asyncio.run(wait_in_queue(parser.parse_args().seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
