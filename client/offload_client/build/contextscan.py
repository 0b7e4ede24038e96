"""Scanning the local sources of a build, in daemon threads, one source at a time."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, cast

from offload_client.bytepipe import in_thread
from offload_client.context.listing import ClientListing
from offload_client.context.source import Selection
from offload_core.errors import ContextError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Mapping

    from offload_client.context.entries import TreeEntry
    from offload_client.context.source import ContextSource
    from offload_proto.v1.node_service_pb2 import ContextRequest

_LOOK_SECONDS = 0.1


class ContextScan:
    """One scan of one source; its listing grows while the scan runs."""

    def __init__(
        self,
        source: ContextSource,
        selection: Selection,
        alone: threading.Lock,
        warn: Callable[[str], None],
    ) -> None:
        """Start the scan.

        Args:
            source: what is scanned.
            selection: what of it is wanted.
            alone: held while it scans.
            warn: told about what is left out, in the thread.
        """
        self.source = source
        self.listing = ClientListing()
        self._selection = selection
        self._alone = alone
        self._warn = warn
        self._stopped = threading.Event()
        # A daemon thread: hashing a huge file must not hold up the end after Ctrl-C.
        self.done: asyncio.Future[None] = in_thread(self._run, name="context-scan")
        """Resolved at the end of the scan; with its error, if it failed."""

    def stop(self) -> None:
        """Give up; the thread ends after the file that it reads."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._alone.acquire(timeout=_LOOK_SECONDS):
            if self._stopped.is_set():
                return
        try:
            # Closed early, a scan still saves what it has learned.
            scan = cast("Generator[TreeEntry]", self.source.scan(self._selection, warn=self._warn))
            with closing(scan):
                for entry in scan:
                    if self._stopped.is_set():
                        return
                    self.listing.add(entry)
            self.listing.finish()
        finally:
            self._alone.release()


class ContextScans:
    """The local sources of one build; shared by all its attempts.

    Scanning and hashing small files is fastest in one thread at a time, and a scan finds in the
    index what the one before has hashed.
    """

    def __init__(self, sources: Mapping[str, ContextSource], warn: Callable[[str], None]) -> None:
        """Scan nothing yet.

        Args:
            sources: by local name.
            warn: told each sentence about what is left out once; called in any thread.
        """
        self._sources = sources
        self._warn = warn
        self._warned: set[str] = set()
        self._alone = threading.Lock()

    def start(self, request: ContextRequest) -> ContextScan:
        """Scan what the node asks for.

        Raises:
            ContextError: there is no such source.
        """
        source = self._sources.get(request.local_name)
        if source is None:
            raise ContextError(f'there is no build context named "{request.local_name}"')
        selection = Selection(
            include=list(request.include_patterns),
            exclude=list(request.exclude_patterns),
            follow=list(request.follow_paths),
        )
        return ContextScan(source, selection, self._alone, self._warn_once)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)
