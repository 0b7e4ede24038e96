"""Blobs in and out of a node's registry, against Debian's docker-registry, over loopback.

Each registry runs in a process of its own, on the same file system. Every run has another blob,
which is removed from both after its round; a pull is one of a blob that was just pushed, so the
page cache has it on both sides.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cache.wire import Wire
from benchmarks.daemons import Daemon, registry, tool_environment
from benchmarks.model import Case
from benchmarks.settle import wait_quiet
from benchmarks.trees import Keystream
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.session import Session

BLOB_BYTES = 512_000_000
RUNS = 8
PEER = "docker-registry"
OURS = "the node's registry"
GOAL = 1.25
"""At least 0.8 of the peer's throughput."""

CASES = (
    Case("registry-pull", f"{OURS}, GET of 512 MB", PEER, goal=GOAL),
    Case("registry-push", f"{OURS}, POST and PUT of 512 MB", PEER, goal=GOAL),
    Case("registry-push-chunked", f"{OURS}, PATCH of unknown length", PEER, goal=GOAL),
)

Push = Callable[[Wire, str, str, Path], float]
PUSHES: dict[str, Push] = {
    "registry-push": Wire.push,
    "registry-push-chunked": Wire.push_chunked,
}


class Side:
    """One of the two registries, running."""

    def __init__(self, address: str, repository: str, contents: Path, pid: int) -> None:
        self.address = address
        self.repository = repository
        self.pid = pid
        self._contents = contents

    def push(self, push: Push, blob: Blob) -> float:
        """Return the seconds of a push over a new connection; the blob is gone afterwards."""
        with Wire(self.address) as wire:
            seconds = push(wire, self.repository, blob.digest, blob.path)
        self._forget(blob.digest)
        return seconds

    def pull(self, blob: Blob) -> float:
        """Return the seconds of a pull over a new connection."""
        with Wire(self.address) as wire:
            return wire.pull(self.repository, blob.digest)

    def _forget(self, digest: str) -> None:
        name = digest.removeprefix("sha256:")
        for found in self._contents.rglob(name):
            if found.is_file():
                found.unlink()
            elif (data := found / "data").is_file():
                data.unlink()


class Blob:
    """512 MB that cannot be compressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = ""
        self._round = -1
        with path.open("wb") as file:
            for piece in Keystream("registry").pieces(BLOB_BYTES):
                file.write(piece)

    def renew(self, number: int) -> None:
        """Change the content, and so the digest, when a new round begins."""
        if number == self._round:
            return
        self._round = number
        with self.path.open("r+b") as file:
            file.write(secrets.token_bytes(32))
        with self.path.open("rb") as file:
            self.digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def registries(session: Session) -> None:
    """Measure the cases that the session wants."""
    folder = session.work / "registry"
    folder.mkdir()
    session.note("writing 512 MB")
    blob = Blob(folder / "blob")
    try:
        with ExitStack() as stack:
            sides = {"ours": _ours(folder / "ours", stack), "peer": _peer(folder / "peer", stack)}
            for case, push in PUSHES.items():
                if session.wants(case):
                    _measure(
                        session, case, sides, lambda side, push=push: side.push(push, blob), blob
                    )
            if session.wants("registry-pull"):
                blob.renew(0)
                for side in sides.values():
                    with Wire(side.address) as wire:
                        wire.push(side.repository, blob.digest, blob.path)
                _measure(session, "registry-pull", sides, lambda side: side.pull(blob))
    finally:
        shutil.rmtree(folder)


def _measure(
    session: Session,
    case: str,
    sides: Mapping[str, Side],
    run: Callable[[Side], float],
    changing: Blob | None = None,
) -> None:
    def contestant(side: Side) -> Callable[[int], float]:
        def timed(number: int) -> float:
            if changing is not None:
                changing.renew(number)
            seconds = run(side)
            wait_quiet([side.pid])
            return seconds

        return timed

    contestants = {name: contestant(side) for name, side in sides.items()}
    found = session.interleave(case, contestants, runs=RUNS)
    session.report(case, found["ours"], found["peer"])


def _ours(folder: Path, stack: ExitStack) -> Side:
    folder.mkdir()
    port = free_port()
    capability = folder / "capability"
    daemon = Daemon(
        "the node's registry",
        [sys.executable, "-m", "benchmarks.cache.registryport", folder, str(port)],
        log=folder / "log",
        environment=tool_environment(folder, PYTHONPATH=os.pathsep.join(sys.path)),
        ready=capability.exists,
    )
    stack.enter_context(daemon)
    return Side(f"127.0.0.1:{port}", f"{capability.read_text()}/image", folder, daemon.pid)


def _peer(folder: Path, stack: ExitStack) -> Side:
    daemon, address = registry(folder)
    stack.enter_context(daemon)
    return Side(address, "bench/image", folder, daemon.pid)
