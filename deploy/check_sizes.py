"""Fail on a module that a reader cannot hold in the head: more than 600 lines."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 600
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("proto/offload_core", "cache", "client", "builder", "tests", "benchmarks", "deploy")


def main() -> int:
    """Print the files above the limit; return 1 when there is one."""
    bad = 0
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = len(path.read_text("utf-8").splitlines())
            if lines > LIMIT:
                print(f"{path.relative_to(ROOT)}: {lines} lines, at most {LIMIT}", file=sys.stderr)
                bad = 1
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
