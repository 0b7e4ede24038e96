"""Cases `sync-*`: an edit of a directory that a container has, in a tree of 20,000 files."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError, Case
from benchmarks.offloaded.ground import IMAGE, Ground
from benchmarks.trees import write_equal_files

if TYPE_CHECKING:
    from benchmarks.session import Session

FILES, FILE_BYTES = 20_000, 2048
FIRST = Case("sync-first", "docker run -v of 20,000 files that nobody has sent", "")
AGAIN = Case("sync-again", "docker run -v of the same, unchanged", "")
EDIT = Case("sync-edit", "an edit here is seen in the container", "", unit="ms", limit=300)
BACK = Case("sync-edit-back", "a container writes a file, it is here", "", unit="ms", limit=300)
CASES = (FIRST, AGAIN, EDIT, BACK)
RUNS = 20
SECONDS = 30.0
# It answers each word with what it sees of the file, and writes what comes after "write".
WATCH = (
    'old=; while :; do read -r new < /srv/edited; [ "$new" = "$old" ] || echo "$new"; old=$new; '
    "usleep 2000; done & "
    "while read -r word; do echo $word > /srv/back; done"
)


def trees(session: Session, folder: Path) -> None:
    """Measure the cases."""
    # Not in `folder`: that may be below /dev, of which sessions get nothing.
    with (
        tempfile.TemporaryDirectory(prefix="tree") as place,
        Ground(folder, ready=0) as ground,
    ):
        ground.start()
        ground.load()
        tree = Path(place) / "tree"
        write_equal_files(tree, files=FILES, file_bytes=FILE_BYTES, variant="sync")
        (tree / "edited").write_text("0\n")
        mount = ("-v", f"{tree}:/srv", IMAGE)
        _, seconds = ground.docker(ground.session, "run", "--rm", *mount, "true")
        session.report(FIRST.name, [seconds])
        found = session.interleave(
            AGAIN.name,
            {"ours": lambda _: ground.docker(ground.session, "run", "--rm", *mount, "true")[1]},
            runs=4,
        )
        session.report(AGAIN.name, found["ours"])
        with subprocess.Popen(
            ["docker", "-H", ground.session, "run", "--rm", "-i", *mount, "sh", "-c", WATCH],
            env=ground.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                _measure(session, tree, process)
            finally:
                process.kill()


def _measure(session: Session, tree: Path, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    reader, writer = process.stdout, process.stdin
    if reader.readline() != b"0\n":
        raise BenchmarkError("the container does not see the file")
    count = 0

    def edit(_: int) -> float:
        nonlocal count
        count += 1
        word = f"edit-{count}\n".encode()
        began = time.perf_counter()
        (tree / "edited").write_bytes(word)
        while (line := reader.readline()) != word:
            if not line:
                raise BenchmarkError("the container has ended")
        return 1000 * (time.perf_counter() - began)

    def back(_: int) -> float:
        nonlocal count
        count += 1
        word = f"back-{count}\n".encode()
        target = tree / "back"
        began = time.perf_counter()
        writer.write(word)
        writer.flush()
        while not target.exists() or target.read_bytes() != word:
            if time.perf_counter() - began > SECONDS:
                raise BenchmarkError("what the container wrote does not come")
            time.sleep(0.001)
        return 1000 * (time.perf_counter() - began)

    found = session.interleave(EDIT.name, {"there": edit, "back": back}, runs=RUNS, warmups=3)
    session.report(EDIT.name, found["there"])
    session.report(BACK.name, found["back"])
