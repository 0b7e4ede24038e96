"""Local sources of a build: what lists their entries and what reads their content."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from offload_client.context.entries import ContextItem


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of a source BuildKit asks for.

    Attributes:
        include: include patterns; empty for all.
        exclude: exclude patterns, in the syntax of .dockerignore.
        follow: only these paths, and what their symbolic links lead to; empty for all.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    follow: Sequence[str] = ()


class ListedContent(NamedTuple):
    """A regular file as it was listed; not empty, and no hard link.

    Attributes:
        path: relative, with "/" as separator.
        size_bytes: of the content.
        sha256: of the content, or of the chunk list of a large file; see `offload_core.chunklist`.
        modified_at_ns: in nanoseconds since 1970 UTC.
    """

    path: str
    size_bytes: int
    sha256: bytes
    modified_at_ns: int


class ContentReader(Protocol):
    """Reads files of one source; for one thread at a time; closed by its owner."""

    def __enter__(self) -> Self:
        """Return itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        ...

    def close(self) -> None:
        """Free what is open; harmless when done twice."""
        ...

    def read(self, file: ListedContent) -> bytes:
        """Return the content of a file that is not large.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        ...

    def read_chunk(self, file: ListedContent, offset: int, size: int) -> bytes:
        """Return a piece of a file, `size` bytes from `offset` on.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        ...

    def chunk_list(self, file: ListedContent) -> bytes:
        """Return the encoded chunk list of a large file, whose SHA-256 is `file.sha256`.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        ...


class ContextSource(Protocol):
    """One local source of a build: a directory, an archive, an OCI layout."""

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Yield the selected entries in BuildKit's order, for a `ClientListing`.

        Runs in a worker thread. It is lazy, and one that is closed early keeps what it learned.

        Args:
            selection: what is wanted.
            warn: told one sentence about what is left out.

        Raises:
            ContextError: the source cannot be read.
            ContextChangedError: it changes all the time.
        """
        ...

    def open(self) -> ContentReader:
        """Return a reader; each is for one thread at a time.

        Raises:
            ContextError: the source cannot be opened any more.
        """
        ...


class DirectorySource:
    """A directory of this machine; threads can share it."""

    def __init__(
        self, root: Path, *, index_path: Path | None, normalise_modes: bool = True
    ) -> None:
        """Take a directory; nothing is read yet.

        Args:
            root: the directory; it may itself be a symbolic link.
            index_path: the stat index, which saves reading unchanged files; None for none.
            normalise_modes: as in `scan_context`.
        """
        self.root = root
        self._index_path = index_path
        self._normalise_modes = normalise_modes
        self._chunk_lists: dict[bytes, bytes] = {}

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Yield the selected entries; see `ContextSource.scan`."""
        from offload_client.context.scan import scan_context
        from offload_client.context.statindex import StatIndex

        with ExitStack() as stack:
            index = None
            if self._index_path is not None:
                index = stack.enter_context(StatIndex(self._index_path, self.root))
            items = scan_context(
                self.root,
                include=selection.include,
                exclude=selection.exclude,
                follow=selection.follow,
                index=index,
                chunk_lists=self._chunk_lists,
                normalise_modes=self._normalise_modes,
                warn=warn,
            )
            # Closed before the index, which it saves.
            yield from stack.enter_context(closing(cast("Generator[ContextItem]", items)))

    def open(self) -> ContentReader:
        """Return a reader; see `ContextSource.open`."""
        from offload_client.context.reader import DirectoryReader

        return DirectoryReader(
            self.root, chunk_lists=self._chunk_lists, index_path=self._index_path
        )
