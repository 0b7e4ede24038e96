"""What is built: Dockerfiles from scratch and a static busybox, so that no network is used."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

SMALL = """\
FROM scratch AS base
COPY salt /salt
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]

FROM base AS build
WORKDIR /src
COPY src .
RUN cat * | md5sum > /sum
RUN sort * | uniq -c > /report

FROM base
COPY --from=build /sum /report /
RUN test -s /sum
"""

DATA = """\
FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]

FROM base AS build
WORKDIR /src
COPY src .
RUN head -c 30000000 /dev/urandom > /objects
RUN seq 1 2500000 > /listing
RUN cat /objects /listing | gzip -1 > /artifact

FROM base
RUN head -c 30000000 /dev/urandom > /runtime
RUN seq 5000000 8000000 > /words
COPY --from=build /artifact /artifact
"""
"""10 steps, 140 MB of layers, 92 MB in the final image: 62 MB with zstd (ours), 72 MB with gzip."""


LAYERS = """\
FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]

FROM base AS deps
COPY salt /salt
RUN seq 1 4500000 > /words && head -c 4000000 /dev/urandom > /noise
RUN mkdir /deps && for i in 1 2 3 4 5 6; do cat /words /noise > /deps/$i; done

FROM deps AS build
COPY src /src
RUN mkdir /out && tr 0-4 5-9 < /words > /out/app && cat /noise /src/* > /out/data
RUN cat /out/* | md5sum > /out/sum

FROM base
COPY --from=deps /deps /deps
COPY --from=build /out /app
COPY last /last
RUN md5sum < /last > /checked
"""
"""12 steps, three stages, layers of up to 240 MB: 580 MB in all, 280 MB in the final image."""


LOG = """\
FROM scratch
COPY busybox /bin/busybox
COPY salt /salt
RUN ["/bin/busybox", "seq", "1", "{lines}"]
"""


UNBUFFERED_LOG = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY salt /salt
RUN i=0; while [ $i -lt {lines} ]; do i=$((i+1)); echo $i; done
"""


def log_project(folder: Path, lines: int, *, unbuffered: bool = False) -> Path:
    """Make a project with a step that prints numbered lines, as fast as it can.

    Args:
        folder: for it.
        lines: how many.
        unbuffered: each line is a write of its own.
    """
    return _project(folder, (UNBUFFERED_LOG if unbuffered else LOG).format(lines=lines))


def layers_project(folder: Path) -> Path:
    """Make a project as the cache meets it: several stages, large layers, some of it noise.

    `salt` decides whether anything is cached, `last` whether the last step is.
    """
    _project(folder, LAYERS)
    (folder / "last").write_text("none")
    return folder


def small_project(folder: Path) -> Path:
    """Make a project whose steps take next to no time; `salt` decides whether they are cached."""
    return _project(folder, SMALL)


def data_project(folder: Path) -> Path:
    """Make a project with large layers."""
    return _project(folder, DATA)


def add_busybox(folder: Path) -> None:
    """Put a static busybox into a context.

    Raises:
        BenchmarkError: the machine has none.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise BenchmarkError("busybox is not installed; run 'make tools'")
    shutil.copy2(busybox, folder / "busybox")


def _project(folder: Path, dockerfile: str) -> Path:
    source = folder / "src"
    source.mkdir(parents=True)
    (folder / "Dockerfile").write_text(dockerfile)
    (folder / "salt").write_text("none")
    add_busybox(folder)
    for number in range(20):
        (source / f"part{number:02}.txt").write_text(f"part {number}\n" * 200)
    return folder
