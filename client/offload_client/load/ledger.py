"""What earlier loads have put into which engine's content store, by digest.

An engine with containerd's store takes an OCI layout that leaves out blobs which it holds, but
nobody tells which these are: image lists name manifests, not layers. So each load notes the layers
of its manifest. A note counts only while the engine still lists that image. Nothing breaks when a
note is lost (more bytes travel) or wrong (the engine refuses, everything is sent).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.dockerconfig import home_directory
from offload_client.eventlog import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_log = get_logger()

_MAX_ENGINES = 20
_MAX_IMAGES = 200

_Notes = dict[str, dict[str, list[str]]]


class LoadLedger:
    """A small JSON file in the user's cache directory; blocking, a few KB."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def for_user(cls, environment: Mapping[str, str]) -> LoadLedger:
        """Return the ledger in `XDG_CACHE_HOME` or ~/.cache."""
        named = environment.get("XDG_CACHE_HOME")
        base = Path(named) if named else home_directory(environment) / ".cache"
        return cls(base / "offload-build" / "loaded.json")

    def blobs(self, engine_id: str, image_ids: Iterable[str]) -> set[str]:
        """Return the digests of blobs that the engine holds because of images it lists."""
        notes = self._read().get(engine_id, {})
        return {digest for image_id in image_ids for digest in notes.get(image_id, ())}

    def note(self, engine_id: str, image_id: str, blobs: Iterable[str]) -> None:
        """Remember that an image was loaded with these blobs in the engine's content store.

        Two loads at the same time may lose one note. A file that cannot be written is logged.
        """
        if not engine_id:
            return
        notes = self._read()
        # Taken out and put in again: the order is the age.
        engine = notes.pop(engine_id, {})
        engine.pop(image_id, None)
        engine[image_id] = sorted(blobs)
        notes[engine_id] = dict(list(engine.items())[-_MAX_IMAGES:])
        try:
            self._write(dict(list(notes.items())[-_MAX_ENGINES:]))
        except OSError as error:
            _log.warning("load.ledger.unwritable", path=str(self._path), error=error.strerror)

    def _read(self) -> _Notes:
        try:
            content = json.loads(self._path.read_bytes())
            return {
                str(engine): {
                    str(image): [str(digest) for digest in digests]
                    for image, digests in images.items()
                }
                for engine, images in content.items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, notes: _Notes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=".loaded-")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(notes, file)
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
