"""Which content of a project is on its way, and which build brings it.

Builds that need the same blob at the same time ask one client for it: the first to claim it brings
it, the others wait. When that build ends without it, the one that waits longest takes over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class Recipient(Protocol):
    """A build that claims blobs."""

    def arrived(self, digests: list[bytes], *, verified: bool) -> None:
        """Hear that blobs that it claimed are stored now."""
        ...

    def take_over(self, digests: list[bytes]) -> None:
        """Hear that it has to bring blobs for which it waited; must not call back at once."""
        ...


class Arrivals:
    """The blobs on their way; one per project, used in the event loop only.

    Holds something for a blob only as long as a build claims it.
    """

    def __init__(self) -> None:
        self._bringing: dict[bytes, Recipient] = {}
        self._waiting: dict[bytes, list[Recipient]] = {}
        """Who waits for a blob that another build brings, first come first."""

    def __len__(self) -> int:
        return len(self._bringing)

    def claim(self, build: Recipient, digest: bytes) -> bool:
        """Note that a build needs a blob; it does so once per blob until it `arrived`.

        Returns:
            Whether this build must bring it; else it waits for another one.
        """
        if self._bringing.setdefault(digest, build) is build:
            return True
        self._waiting.setdefault(digest, []).append(build)
        return False

    def brings(self, build: Recipient, digest: bytes) -> bool:
        """Return whether a build is the one that brings a blob."""
        return self._bringing.get(digest) is build

    def arrived(self, digests: Iterable[bytes], *, verified: bool) -> None:
        """Tell every build that claims one of these blobs that it is stored.

        Args:
            digests: of the blobs.
            verified: their bytes were hashed just now and not only found.
        """
        told: dict[Recipient, list[bytes]] = {}
        for digest in digests:
            bringer = self._bringing.pop(digest, None)
            if bringer is not None:
                told.setdefault(bringer, []).append(digest)
                for build in self._waiting.pop(digest, ()):
                    told.setdefault(build, []).append(digest)
        for build, found in told.items():
            build.arrived(found, verified=verified)

    def take(self, build: Recipient, digests: Iterable[bytes]) -> list[bytes]:
        """Let a build bring blobs for which it has waited too long; who was to bring them waits.

        Returns:
            Those that it must bring now.
        """
        taken = []
        for digest in digests:
            waiting = self._waiting.get(digest, [])
            if build in waiting:
                waiting[waiting.index(build)] = self._bringing[digest]
                self._bringing[digest] = build
                taken.append(digest)
        return taken

    def give_up(self, build: Recipient, digests: Iterable[bytes]) -> None:
        """End the claims of a build; what it was to bring, the next one that waits brings."""
        heirs: dict[Recipient, list[bytes]] = {}
        for digest in digests:
            waiting = self._waiting.get(digest, [])
            if self._bringing.get(digest) is not build:
                if build in waiting:
                    waiting.remove(build)
            elif waiting:
                heir = self._bringing[digest] = waiting.pop(0)
                heirs.setdefault(heir, []).append(digest)
            else:
                del self._bringing[digest]
            if not waiting:
                self._waiting.pop(digest, None)
        for heir, found in heirs.items():
            heir.take_over(found)
