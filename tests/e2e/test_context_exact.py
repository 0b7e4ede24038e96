"""What is built is exactly what the directory holds, whatever has changed in it since."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.relayedpool import RelayedPool
from tests.fixtures.trees import noise, of_directory, of_tar, times_of_tar, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    """One node, so that what was sent once is there."""
    with RelayedPool() as running:
        yield running


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildkitd]:
    """BuildKit as its own client uses it."""
    with Buildkitd(tmp_path_factory.mktemp("stock")) as daemon:
        yield daemon


def build(member: Member, *arguments: str | Path) -> dict[str, Any]:
    """Build, and return the numbers of the build."""
    result = member.build(*arguments)
    assert result.returncode == 0, result.stderr
    stats: dict[str, Any] = member.wait_state("succeeded")["stats"]
    return stats


def everything(folder: Path) -> Path:
    """Write a tree with all that a build context can have."""
    deep = "/".join(f"level{number}" for number in range(30))
    write_files(
        folder,
        {
            "Dockerfile": "FROM scratch\nCOPY . /\n",
            ".dockerignore": "Dockerfile\n.dockerignore\nignored\n",
            "ignored/file": "not part of it",
            "small": "first",
            "empty": "",
            "script": "#!/bin/sh\n",
            "four-mib": noise("four", 4 << 20),
            "four-mib-and-one": noise("more", (4 << 20) + 1),
            "becomes-directory": "a file",
            "attributed": "with attributes",
            "first-name": "linked",
            f"{deep}/bottom": "deep",
            "grün/日本語/ Leerzeichen \t.txt": "names",
            "a-b/x": "order",
            "a/x": "order",
            "a.b/x": "order",
            "folder/one": "1",
        },
    )
    (folder / "script").chmod(0o755)
    (folder / "empty-folder").mkdir()
    os.link(folder / "first-name", folder / "second-name")
    (folder / "relative").symlink_to("folder/one")
    (folder / "dangling").symlink_to("../../nowhere")
    (folder / "absolute").symlink_to("/etc/hostname")
    os.setxattr(folder / "attributed", "user.note", b"one")
    os.setxattr(folder / "folder", "user.note", b"of a directory")
    return folder


def rewrite(path: Path, content: bytes) -> None:
    """Change the content and nothing else that can be seen from outside."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def replace(path: Path, make: Callable[[], object]) -> None:
    """Delete a name and make it anew."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    make()


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda c: None, 0),
    "other bytes, same size and time": (lambda c: rewrite(c / "small", b"other"), 5),
    "executable": (lambda c: (c / "small").chmod(0o755), 0),
    "executable no more": (lambda c: (c / "script").chmod(0o644), 0),
    "attribute of a file": (lambda c: os.setxattr(c / "attributed", "user.note", b"two"), 0),
    "attribute gone": (lambda c: os.removexattr(c / "attributed", "user.note"), 0),
    "link leads elsewhere": (
        lambda c: replace(c / "relative", lambda: (c / "relative").symlink_to("folder/two")),
        0,
    ),
    "link becomes file": (
        lambda c: replace(c / "dangling", lambda: (c / "dangling").write_text("file")),
        4,
    ),
    "file becomes directory": (
        lambda c: replace(
            c / "becomes-directory",
            lambda: write_files(c, {"becomes-directory/inside": "inside"}),
        ),
        6,
    ),
    "directory becomes file": (
        lambda c: replace(
            c / "becomes-directory", lambda: write_files(c, {"becomes-directory": "a file"})
        ),
        0,
    ),
    "content behind two names": (lambda c: rewrite(c / "first-name", b"LINKED"), 6),
    "and nothing else": (lambda c: (c / "script").write_text("#!/bin/bash\n"), 12),
    "hard link gets a file of its own": (
        lambda c: replace(c / "second-name", lambda: write_files(c, {"second-name": "linked"})),
        0,
    ),
    "empty file is filled, another is emptied": (
        lambda c: write_files(c, {"empty": "now filled", "folder/one": ""}),
        10,
    ),
    "one byte of the largest whole file": (
        lambda c: rewrite(c / "four-mib", b"!"),
        4 << 20,
    ),
    "one byte of the smallest file in pieces": (
        lambda c: rewrite(c / "four-mib-and-one", b"!"),
        2 << 20,
    ),
    "directory renamed and file deleted": (
        lambda c: ((c / "grün").rename(c / "größer"), (c / "first-name").unlink()),
        0,
    ),
}


def test_what_is_built_is_what_the_directory_holds(
    relayed: RelayedPool, stock: Buildkitd, tmp_path: Path
) -> None:
    member = relayed.member()
    context = everything(tmp_path / "c")
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    build(member, "-o", f"type=tar,dest={ours}", context)
    done = stock.buildctl(
        "build", "--frontend", "dockerfile.v0", "--local", f"context={context}",
        "--local", f"dockerfile={context}", "--output", f"type=tar,dest={theirs}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(of_tar(ours).items()) == list(of_tar(theirs).items())
    assert times_of_tar(ours) == times_of_tar(theirs)
    for name, (change, bound) in CHANGES.items():
        change(context)
        stats = build(member, "-o", f"type=tar,dest={ours}", context)
        expected = of_directory(context)
        for left_out in ("Dockerfile", ".dockerignore", "ignored", "ignored/file"):
            del expected[left_out]
        assert of_tar(ours) == expected, name
        if bound > 1 << 20:
            assert 0 < stats["context_sent_bytes"] <= bound, name
        else:
            assert stats["context_sent_bytes"] == bound, name
