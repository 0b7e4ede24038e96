"""What the calls to a shared store tell of its health, by what they ask for.

Reads and writes have a circuit each, so that a full or read-only bucket still serves its readers.
A refusal ("403") comes at once and says nothing of other requests: each verb has a circuit for
those. Builds wait for reads, so while these are cut off, only a background probe asks the store.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from offload_cache.health import REACHABLE, StoreHealth

if TYPE_CHECKING:
    from collections.abc import Iterator


class Verb(Enum):
    """What a request is about."""

    GET = "to read objects"
    HEAD = "to look at objects"
    LIST = "to list objects"
    PUT = "to write objects"
    DELETE = "to delete objects"


READS = frozenset({Verb.GET, Verb.HEAD, Verb.LIST})


class StoreCircuits:
    """The circuits of one store. Safe for any thread.

    Args:
        health: the circuit of the reads; its bounds hold for the others, too.
    """

    def __init__(self, health: StoreHealth) -> None:
        self.reads = health.sibling("is not reachable", calls_probe=False)
        self.writes = health.sibling("takes no writes")
        self._refusals = {verb: health.sibling(f"does not allow us {verb.value}") for verb in Verb}

    def _of(self, verb: Verb) -> StoreHealth:
        return self.reads if verb in READS else self.writes

    def _all(self) -> Iterator[StoreHealth]:
        yield self.reads
        yield from (self._refusals[verb] for verb in (Verb.GET, Verb.HEAD, Verb.LIST))
        yield self.writes
        yield from (self._refusals[verb] for verb in (Verb.PUT, Verb.DELETE))

    @property
    def reachable(self) -> bool:
        """Whether reading an object is worth trying."""
        return self.reads.reachable and self._refusals[Verb.GET].reachable

    @property
    def state(self) -> str:
        """One sentence for people; what reads suffer comes first."""
        return next((circuit.state for circuit in self._all() if circuit.is_open), REACHABLE)

    def check(self, verb: Verb) -> None:
        """Let a call through, or refuse it.

        Raises:
            CacheUnavailableError: the store failed a moment ago; it is not asked now.
        """
        self._of(verb).check()
        try:
            self._refusals[verb].check()
        except Exception:
            self._of(verb).abandoned()
            raise

    def succeeded(self, verb: Verb) -> None:
        """Note an answer."""
        self._of(verb).succeeded()
        self._refusals[verb].succeeded()

    def abandoned(self, verb: Verb) -> None:
        """Note that the caller left before the answer."""
        self._of(verb).abandoned()
        self._refusals[verb].abandoned()

    def refused(self, verb: Verb, cause: str) -> None:
        """Note that the store answered, but not with what was asked for."""
        self._of(verb).succeeded()
        self._refusals[verb].failed(cause)

    def failed(self, verb: Verb, cause: str, *, weight: int = 1) -> None:
        """Note that the store did not answer."""
        self._refusals[verb].abandoned()
        self._of(verb).failed(cause, weight=weight)
