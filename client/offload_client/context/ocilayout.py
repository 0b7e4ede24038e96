"""An OCI image layout as a build context: the blobs of one image of it.

Source: the OCI image layout specification 1.1, and how buildx finds an image in a layout
(BuildKit's client/ociindex).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from offload_client.context.source import Selection
from offload_core.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from offload_client.context.entries import ContextItem
    from offload_client.context.source import ContentReader, DirectorySource

INDEX_FILE = "index.json"
DEFAULT_TAG = "latest"
MAX_DOCUMENT_BYTES = 8 << 20
"""Of an index or a manifest."""
_DOCUMENTS = ("manifest.v1+json", "index.v1+json", "manifest.v2+json", "manifest.list.v2+json")
_NAME = "io.containerd.image.name"
_TAG = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"([a-z0-9]+(?:[.+_-][a-z0-9]+)*):([0-9a-fA-F]{32,})")


class LayoutReference:
    """What stands behind "oci-layout://": PATH[:TAG][@DIGEST].

    Attributes:
        path: directory of the layout, as given.
        tag: "latest" when none is given.
        digest: empty when none is given.
    """

    def __init__(self, text: str) -> None:
        """Take a reference apart; the path has no colon."""
        rest, _, self.digest = text.partition("@")
        self.path, _, tag = rest.partition(":")
        self.tag = tag or DEFAULT_TAG


def find_image(layout: Path, reference: LayoutReference) -> str:
    """Return the digest of the image that a reference means.

    Without a digest that is the image of the tag, else the only one in the layout.

    Raises:
        ContextError: the layout cannot be read, or has no such image.
    """
    digest = reference.digest
    if not digest:
        images = _list(read_document(layout / INDEX_FILE), "manifests")
        named = [image for key in (_NAME, _TAG) for image in images
                 if _annotations(image).get(key) == reference.tag]  # fmt: skip
        if not named and len(images) != 1:
            raise ContextError(
                f"{layout / INDEX_FILE} has {len(images)} images and none with the tag "
                f'"{reference.tag}"'
            )
        digest = str((named or images)[0].get("digest", ""))
    if not _blob(layout, digest).is_file():
        raise ContextError(f"{layout} has no blob {digest}")
    return digest


class LayoutSource:
    """The blobs that belong to one image of a layout, as a local source."""

    def __init__(self, directory: DirectorySource, layout: Path, digest: str) -> None:
        """Prepare the source.

        Args:
            directory: the layout as a directory.
            layout: its path.
            digest: of the image's index or manifest.
        """
        self._directory = directory
        self._layout = layout
        self._digest = digest

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Yield the blobs that are there; an index may name platforms that the layout lacks.

        Args:
            selection: not looked at; BuildKit asks for blobs by digest.
            warn: told one sentence about what is left out.

        Raises:
            ContextError: a manifest or blob cannot be read.
        """
        del selection
        paths = [blob.relative_to(self._layout).as_posix() for blob in self.blobs()]
        return self._directory.scan(Selection(include=paths), warn=warn)

    def open(self) -> ContentReader:
        """Return a reader for one thread."""
        return self._directory.open()

    def blobs(self) -> list[Path]:
        """Return the files of the image's blobs that are there.

        Raises:
            ContextError: a manifest cannot be read.
        """
        found: dict[str, Path] = {}
        waiting = [(self._digest, True)]
        while waiting:
            digest, is_document = waiting.pop()
            path = _blob(self._layout, digest)
            if digest in found or not path.is_file():
                continue
            found[digest] = path
            if is_document:
                document = read_document(path)
                waiting += [
                    (_digest(item), _is_document(item)) for item in _list(document, "manifests")
                ]
                waiting += [(_digest(item), False) for item in _list(document, "layers")]
                if isinstance(config := document.get("config"), dict):
                    waiting.append((_digest(config), False))
        return list(found.values())


def _blob(layout: Path, digest: str) -> Path:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ContextError(f'{layout} names a blob by "{digest}", which is not a digest')
    return layout / "blobs" / match[1] / match[2]


def _digest(descriptor: dict[str, Any]) -> str:
    return str(descriptor.get("digest", ""))


def _is_document(descriptor: dict[str, Any]) -> bool:
    """Tell manifests from layers, which the index of a cache may name among them."""
    return str(descriptor.get("mediaType") or _DOCUMENTS[0]).endswith(_DOCUMENTS)


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object of a manifest, an index or the layout's index file.

    Raises:
        ContextError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ContextError(f"could not read {path}: {error.strerror}") from error
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ContextError(f"{path} has more than {MAX_DOCUMENT_BYTES} bytes")
    try:
        document = json.loads(data)
    except ValueError as error:
        raise ContextError(f"could not read {path}: it is not JSON") from error
    if not isinstance(document, dict):
        raise ContextError(f"could not read {path}: it is not an image index or manifest")
    return document


def _list(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = document.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _annotations(descriptor: dict[str, Any]) -> dict[str, Any]:
    found = descriptor.get("annotations")
    return found if isinstance(found, dict) else {}
