"""What a build still needs its client for; with nothing left it goes on without one."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.node_service_pb2 import Independence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.events_pb2 import ProgressBatch

CONTEXT = "the build context"
LOGINS = "the registry logins"
SECRETS = "the secrets"
SSH = "the SSH agent"
_STREAMED = {
    Output.TYPE_LOCAL: "local",
    Output.TYPE_TAR: "tar",
    Output.TYPE_OCI: "oci",
    Output.TYPE_DOCKER: "docker",
}
_STEP = re.compile(r"\[(?!internal\])(?:[^\]]* )?\d+/\d+\] ")
"""How the Dockerfile frontend begins the names of steps, for example "[linux/amd64 build 2/4] "."""
_LOCAL_ENDINGS = ("load build context", "load from client")
"""How it ends the names of local sources (frontend/dockerui: config.go, namedcontext.go)."""


class ClientNeeds:
    """Reasons for which a client must be there, in words that follow "it needs you for "."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self.on_change: Callable[[], None] = lambda: None
        """Called when the first reason comes or the last one goes, and when the words change."""

    def begin(self, what: str) -> None:
        """Note a need; each `begin` has its `end`."""
        before = self.words
        self._held[what] += 1
        self._changed(before)

    def end(self, what: str) -> None:
        """Note that a need is over."""
        before = self.words
        self._held[what] -= 1
        if self._held[what] <= 0:
            del self._held[what]
        self._changed(before)

    @contextmanager
    def hold(self, what: str) -> Iterator[None]:
        """Need something while the block runs."""
        self.begin(what)
        try:
            yield
        finally:
            self.end(what)

    def clear(self) -> None:
        """Need nothing any more: the build is over."""
        before = self.words
        self._held.clear()
        self._changed(before)

    @property
    def independent(self) -> bool:
        """Whether the build goes on without a client."""
        return not self._held

    @property
    def words(self) -> str:
        """The needs, as in a sentence; empty when there is none."""
        return " and ".join(self._held)

    def needs_context(self) -> bool:
        """Return whether a local source is not complete."""
        return CONTEXT in self._held

    def message(self) -> Independence:
        """Return what clients are told."""
        return Independence(independent=self.independent, needs=self.words)

    def _changed(self, before: str) -> None:
        if self.words != before:
            self.on_change()


def lasting_needs(spec: BuildSpec) -> list[str]:
    """Return what a build needs its client for until its end."""
    found = [
        f"the output of type {_STREAMED[output.type]}"
        for output in spec.outputs
        if output.type in _STREAMED
    ]
    found += ["the exported cache" for item in spec.cache_exports if item.type == "local"]
    if spec.ssh_ids:
        found.append(SSH)
    return found


def has_local_sources(spec: BuildSpec) -> bool:
    """Return whether BuildKit may read directories of the client."""
    locals_named = any(value.startswith("local:") for value in spec.named_contexts.values())
    return not spec.context_url or locals_named


class ContextWatch:
    """Finds out from the progress when BuildKit has read all local sources that it will read.

    BuildKit does not say so. But when a step of the Dockerfile has begun, its whole graph is
    known, and every local source in it has been told of.
    """

    def __init__(self, needs: ClientNeeds, spec: BuildSpec) -> None:
        self._needs = needs
        self._loading: set[str] = set()
        self._known = False
        self._holds = has_local_sources(spec)
        if self._holds:
            needs.begin(CONTEXT)

    def take(self, batch: ProgressBatch) -> None:
        """Look at what BuildKit tells."""
        if not self._holds:
            return
        for vertex in batch.vertices:
            if vertex.name.endswith(_LOCAL_ENDINGS):
                if vertex.HasField("completed_at"):
                    self._loading.discard(vertex.digest)
                else:
                    self._loading.add(vertex.digest)
            elif _STEP.match(vertex.name):
                self._known |= vertex.HasField("started_at") or vertex.cached
        if self._known and not self._loading:
            self.release()

    def release(self) -> None:
        """End the need; what is being read still counts by itself."""
        if self._holds:
            self._holds = False
            self._needs.end(CONTEXT)
