"""What a cache mount saves on a node that never had it, and what it costs where it saves nothing.

Each figure is one build on a BuildKit that was just started; the shared store is MinIO. The step
works like a compiler with a cache: it makes 4,000 files of 50 KB, those that the mount lacks.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError, Case
from offload_cache.s3store import S3Config, S3Store
from tests.fixtures.minio import MinioServer
from tests.fixtures.mountnode import MountNode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.session import Session

FILES = 4_000
FILE_BYTES = 50_000
STEPS = 20
COLD = "a cold node without the mount"

CASES = (
    Case("mounts-cold", "a cold node, the mount is restored", COLD, goal=0.5),
    Case("mounts-warm", "a cold node, the mount is restored", "the node that has the mount"),
    Case("mounts-useless", "a step that its mount of 200 MB does not help", COLD,
         goal=1.05),
    Case("mounts-steps", f"{STEPS} short steps, each told to the node", "stock BuildKit",
         goal=1.05),
)  # fmt: skip

_COMPILE = (
    f"RUN --mount=type=cache,target=/cache cd /cache && i=0 && while [ $i -lt {FILES} ]; do"
    " d=$((i % 256)); f=$d/$i; if [ ! -e $f ]; then mkdir -p $d;"
    f" head -c {FILE_BYTES} /dev/urandom | gzip -1 > $f; fi; i=$((i + 1)); done\n"
)
_USELESS = (
    "RUN --mount=type=cache,target=/cache head -c 200000000 /dev/urandom > /cache/big; sleep 6\n"
)
_SHORT = "".join(f"RUN echo {number}\n" for number in range(STEPS))


def mounts(session: Session) -> None:
    """Measure the cases."""
    with MinioServer(session.work / "minio") as minio:
        _Bench(session, minio).run()


class _Bench:
    def __init__(self, session: Session, minio: MinioServer) -> None:
        self._session = session
        self._minio = minio
        self._shared = session.work / "unused"

    def _node(self, bucket: str, *, moving: bool = True) -> MountNode:
        store = S3Store(
            S3Config(
                endpoint_url=self._minio.endpoint_url,
                bucket=bucket,
                access_key=self._minio.access_key,
                secret_key=self._minio.secret_key,
            )
        )
        return MountNode(self._shared, objects=store, moving=moving)

    def _on_node(
        self, bucket: str, work: Callable[[MountNode], Awaitable[float]], *, moving: bool = True
    ) -> float:
        async def run() -> float:
            async with self._node(bucket, moving=moving) as node:
                return await work(node)

        return asyncio.run(run())

    def run(self) -> None:
        session = self._session
        if session.wants("mounts-cold", "mounts-warm"):
            self._compile()
        if session.wants("mounts-useless"):
            self._useless()
        if session.wants("mounts-steps"):
            self._steps()

    def _compile(self) -> None:
        session = self._session
        warm: list[float] = []

        async def fill(node: MountNode) -> float:
            seconds = await node.build(_COMPILE)
            begun = time.monotonic()
            await node.settle()
            session.note(f"stored in {time.monotonic() - begun:.1f} s")
            warm.extend([await node.build(f"RUN echo {n}\n{_COMPILE}") for n in range(3)])
            return seconds

        session.note(f"filled in {self._on_node('compile', fill):.1f} s")

        async def restored(node: MountNode) -> float:
            seconds = await node.build(_COMPILE)
            if not node.told:
                raise BenchmarkError("the mount was not restored")
            session.note(node.told[0])
            return seconds

        found = session.interleave(
            "mounts-cold",
            {
                "ours": lambda _: self._on_node("compile", restored),
                "off": lambda _: self._on_node("compile", _plain(_COMPILE), moving=False),
            },
            runs=2,
            warmups=0,
        )
        session.report("mounts-cold", found["ours"], found["off"])
        ours = found["ours"]
        session.report("mounts-warm", ours, (warm * len(ours))[: len(ours)])

    def _useless(self) -> None:
        async def fill(node: MountNode) -> float:
            for number in range(2):
                await node.build(f"RUN echo {number}\n{_USELESS}")
                await node.settle()
            return 0.0

        self._on_node("useless", fill)

        async def ours(node: MountNode) -> float:
            seconds = await node.build(_USELESS)
            self._session.note(f"restored: {node.told or 'nothing'}")
            return seconds

        found = self._session.interleave(
            "mounts-useless",
            {
                "ours": lambda _: self._on_node("useless", ours),
                "off": lambda _: self._on_node("useless", _plain(_USELESS), moving=False),
            },
            runs=3,
            warmups=1,
        )
        self._session.report("mounts-useless", found["ours"], found["off"])

    def _steps(self) -> None:
        found = self._session.interleave(
            "mounts-steps",
            {
                "ours": lambda _: self._on_node("steps", _plain(_SHORT)),
                "off": lambda _: self._on_node("steps", _plain(_SHORT), moving=False),
            },
            runs=6,
        )
        self._session.report("mounts-steps", found["ours"], found["off"])


def _plain(steps: str) -> Callable[[MountNode], Awaitable[float]]:
    async def work(node: MountNode) -> float:
        return await node.build(steps)

    return work
