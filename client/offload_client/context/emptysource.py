"""A build context without files, for a Dockerfile that comes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Self

from offload_client.context.hashing import changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from offload_client.context.entries import ContextItem
    from offload_client.context.source import ListedContent, Selection


class EmptySource:
    """A source that has nothing."""

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Yield nothing."""
        del selection, warn
        yield from ()

    def open(self) -> EmptyReader:
        """Return a reader."""
        return EmptyReader()


class EmptyReader:
    """Has nothing to read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""

    def read(self, file: ListedContent) -> NoReturn:
        """Refuse.

        Raises:
            ContextChangedError: always.
        """
        raise changed(file.path, "there never was a file")

    def read_chunk(self, file: ListedContent, offset: int, size: int) -> NoReturn:
        """Refuse.

        Raises:
            ContextChangedError: always.
        """
        del offset, size
        self.read(file)

    def chunk_list(self, file: ListedContent) -> NoReturn:
        """Refuse.

        Raises:
            ContextChangedError: always.
        """
        self.read(file)
