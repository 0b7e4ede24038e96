"""Joining the archives of several legs: file trees (type=tar) and OCI layouts (type=oci).

Sources: POSIX pax, "ustar Interchange Format" (an archive ends with two blocks of zeros); OCI image
specification, "Image Layout".
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

from offload_core.errors import ConfigError, InternalError
from offload_core.imageindex import JoinedIndex, join_indexes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_BLOCK_BYTES = 512
_COPY_BYTES = 1 << 20
_BLOBS = "blobs/sha256/"


def join_trees(parts: Sequence[Path], target: Path) -> None:
    """Write one archive with the files of several; for a worker thread.

    Raises:
        InternalError: a part is no whole archive.
        ConfigError: the disk is full, for example.
    """
    try:
        with target.open("xb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    left = _content_bytes(part)
                    while left:
                        data = file.read(min(left, _COPY_BYTES))
                        if not data:
                            raise _damaged(part)
                        whole.write(data)
                        left -= len(data)
            whole.write(bytes(2 * _BLOCK_BYTES))
    except OSError as error:
        raise _unwritten(target, error) from error


def _content_bytes(part: Path) -> int:
    """Return how long an archive is without its end."""
    try:
        with tarfile.open(part, "r:") as archive:
            while archive.next() is not None:
                # Members are not needed, and there may be many.
                archive.members.clear()  # type: ignore[attr-defined]
            return archive.offset
    except tarfile.TarError as error:
        raise _damaged(part) from error


def join_layouts(parts: Sequence[Path], target: Path, platforms: Sequence[str]) -> JoinedIndex:
    """Write one OCI layout with the images of several; for a worker thread.

    Args:
        parts: layouts, as BuildKit wrote them.
        target: what is written.
        platforms: of the whole build, in its order.

    Returns:
        The index.

    Raises:
        InternalError: a part is no whole layout.
        ConfigError: the disk is full, for example.
    """
    roots: list[bytes] = []
    names: list[dict[str, Any]] = []
    written: set[str] = set()
    try:
        with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as whole:
            for part in parts:
                with _open(part) as archive:
                    entries = _entries(archive, part)
                    names = names or entries
                    root = f"{_BLOBS}{entries[0]['digest'].partition(':')[2]}"
                    roots.append(_read(archive, root, part))
                    # The part's own index is not that of the image.
                    written.add(root)
                    _copy_blobs(archive, whole, written)
            index = join_indexes(roots, platforms)
            _add(whole, f"{_BLOBS}{index.digest.partition(':')[2]}", index.raw)
            descriptors = [index.descriptor(entry.get("annotations")) for entry in names]
            document = {"schemaVersion": 2, "manifests": descriptors}
            _add(whole, "index.json", json.dumps(document).encode())
            _add(whole, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
    except OSError as error:
        raise _unwritten(target, error) from error
    return index


def _open(part: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(part, "r:")
    except tarfile.TarError as error:
        raise _damaged(part) from error


def _entries(archive: tarfile.TarFile, part: Path) -> list[dict[str, Any]]:
    try:
        found: Mapping[str, Any] = json.loads(_read(archive, "index.json", part))
        entries = [dict(entry) for entry in found["manifests"]]
        if len({str(entry["digest"]) for entry in entries}) != 1:
            raise _damaged(part)
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(part) from error
    return entries


def _copy_blobs(archive: tarfile.TarFile, whole: tarfile.TarFile, written: set[str]) -> None:
    for member in archive:
        if member.isreg() and member.name.startswith(_BLOBS) and member.name not in written:
            written.add(member.name)
            content = archive.extractfile(member)
            if content is not None:
                with content:
                    whole.addfile(member, content)


def _read(archive: tarfile.TarFile, name: str, part: Path) -> bytes:
    try:
        content = archive.extractfile(name)
    except (KeyError, tarfile.TarError) as error:
        raise _damaged(part) from error
    if content is None:
        raise _damaged(part)
    with content:
        return content.read()


def _add(whole: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    whole.addfile(member, io.BytesIO(data))


def _damaged(part: Path) -> InternalError:
    return InternalError(
        f"the output of the build for some of its platforms arrived damaged ({part.name}); "
        "run the build again"
    )


def _unwritten(target: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the output to {target.parent}: {error.strerror}; TMPDIR names another place"
    )


def remove(folder: Path) -> None:
    """Remove what legs have left."""
    shutil.rmtree(folder, ignore_errors=True)
