"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError
from benchmarks.report import format_table, machine, to_json
from benchmarks.session import Session
from benchmarks.suite import find_benchmarks

if TYPE_CHECKING:
    from benchmarks.model import Benchmark

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    benchmarks = find_benchmarks()
    options = _parser(sorted(benchmarks)).parse_args(arguments)
    if options.command == "list":
        for benchmark in benchmarks.values():
            _describe(benchmark)
        return 0
    if os.geteuid() != 0:
        print("ERROR: BuildKit needs root; run this with sudo", file=sys.stderr)
        return 1
    # SIGTERM unwinds as Ctrl-C does, so that every daemon is stopped.
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        return _run(benchmarks[options.name], options)
    except BenchmarkError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return 130


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the benchmarks and their cases")
    run = commands.add_parser("run", help="run a benchmark; needs root")
    run.add_argument("name", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    run.add_argument("--runs", type=_positive, metavar="N", help="counted runs of every case")
    run.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="CASE",
        help="only this case, or those that begin with it; repeatable",
    )
    run.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp"),
        metavar="DIR",
        help="everybody's data is below this directory; one in memory (/dev/shm) keeps the noise "
        "of a shared disk out of the figures; short, because sockets lie below",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _describe(benchmark: Benchmark) -> None:
    print(f"{benchmark.name}: {benchmark.summary}")
    for case in benchmark.cases:
        peer = f", against {case.peer}" if case.peer else ""
        goal = f" (goal {case.goals})" if case.goals else ""
        print(f"  {case.name:28} {case.ours}{peer}{goal}")


def _run(benchmark: Benchmark, options: argparse.Namespace) -> int:
    if options.json is not None and not options.json.parent.is_dir():
        raise BenchmarkError(f"there is no directory {options.json.parent} for the figures")
    before = machine()
    # Short: sockets lie below, and a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ob", dir=options.work) as work:
        session = Session(benchmark, Path(work), cases=options.case, runs=options.runs)
        benchmark.run(session)
        rows = session.rows
    print(f"Machine: {before}\n")
    print(format_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(to_json(rows), indent=2) + "\n")
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    # An impatient second one would leave daemons behind; each of them is given bounded time.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
