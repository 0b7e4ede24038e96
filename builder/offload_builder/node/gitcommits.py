"""Which commits a build had from its git contexts over SSH.

The cache of a build is exported by a second solve, after its client has left, and nobody can sign
for an SSH server then. BuildKit asks the server only for what a branch or tag means: a context that
is named by its commit it finds among what it has fetched, under the same cache key. What a branch
meant is in the output of `git ls-remote`, which BuildKit shows.

Source: BuildKit's source/git (resolveMetadata, shaToCacheKey) and frontend/dockerui.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_proto.v1.build_spec_pb2 import BuildSpec

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import ProgressBatch

MAX_OUTPUT_BYTES = 64 << 10
"""Of one repository; what `ls-remote` says comes first."""
_STEP = "[internal] load git source "
_OVER_SSH = re.compile(r"ssh://.*|[^/@\s]+@[^/:\s]+:.*", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LINE = re.compile(r"^((?:[0-9a-f]{40}|[0-9a-f]{64})|ref: \S+)\t(\S+)\r?$", re.MULTILINE)


class GitCommits:
    """Reads the progress of one build."""

    def __init__(self, spec: BuildSpec) -> None:
        self._spec = spec
        contexts = (spec.context_url, *spec.named_contexts.values())
        self._output = {url: bytearray() for url in contexts if _OVER_SSH.fullmatch(url)}
        self._steps: dict[str, str] = {}

    def see(self, batch: ProgressBatch) -> None:
        """Look at what BuildKit tells."""
        if not self._output:
            return
        for vertex in batch.vertices:
            url = vertex.name.removeprefix(_STEP)
            if url in self._output and url != vertex.name:
                self._steps[vertex.digest] = url
        for log in batch.logs:
            output = self._output.get(self._steps.get(log.vertex, ""))
            if output is not None:
                output += log.data[: MAX_OUTPUT_BYTES - len(output)]

    def pinned(self) -> BuildSpec:
        """Return the request with commits in place of branches and tags, as far as known."""
        known = {url: _pinned(url, bytes(output)) for url, output in self._output.items()}
        if not known:
            return self._spec
        spec = BuildSpec()
        spec.CopyFrom(self._spec)
        spec.context_url = known.get(spec.context_url, spec.context_url)
        for name, value in self._spec.named_contexts.items():
            spec.named_contexts[name] = known.get(value, value)
        return spec


def _pinned(url: str, output: bytes) -> str:
    base, _, fragment = url.partition("#")
    reference, colon, folder = fragment.partition(":")
    if "?" in base or _COMMIT.fullmatch(reference):
        # What a query says of the commit is more than this knows of.
        return url
    commit = _commit(reference, output.decode("utf-8", "replace"))
    return f"{base}#{commit}{colon}{folder}" if commit else url


def _commit(reference: str, output: str) -> str:
    """Return what a branch or tag means, by BuildKit's order; empty when that is not told."""
    told = {name: value for value, name in _LINE.findall(output)}
    reference = reference or _branch(output)
    if not reference:
        return ""
    branch = f"refs/heads/{reference.removeprefix('refs/heads/')}"
    tag = f"refs/tags/{reference.removeprefix('refs/tags/')}"
    names = [branch, f"{tag}^{{}}", tag]
    if (other := f"refs/{reference.removeprefix('refs/')}") not in names:
        names.insert(0, other)
    return next((told[name] for name in names if _COMMIT.fullmatch(told.get(name, ""))), "")


def _branch(output: str) -> str:
    """Return the server's default branch."""
    for value, name in _LINE.findall(output):
        if name == "HEAD" and value.startswith("ref: "):
            return str(value.removeprefix("ref: "))
    return ""
