"""Counters of the cache, as plain numbers that the node exports."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CacheStatistics:
    """Totals since the start of the process. Only the event loop's thread changes them.

    Attributes:
        manifest_hits: cache manifests offered to a build.
        manifest_misses: cache manifests asked for that no scope had.
        blob_hits: blobs sent from this node.
        blob_misses: blobs asked for that neither disk nor shared store had.
        request_errors: registry requests that failed for another reason.
        bytes_served: body bytes sent by the registry.
        bytes_received: body bytes taken in by the registry.
        blobs_mounted: blobs that a repository took over without a transfer.
        shared_reads: objects read from the shared store.
        shared_bytes_read: their bytes.
        shared_writes: objects written to the shared store.
        shared_bytes_written: their bytes.
        shared_writes_skipped: objects that the shared store had already.
        shared_failures: calls to the shared store that failed.
        corrupt_objects: objects of the shared store whose bytes were not what their name says.
        base_checks: names of base images that an upstream registry was asked for.
        base_stale_answers: of these, answered from memory because no registry answered.
        base_pulls: manifests and blobs pulled from upstream registries.
        base_bytes_pulled: their bytes.
    """

    manifest_hits: int = 0
    manifest_misses: int = 0
    blob_hits: int = 0
    blob_misses: int = 0
    request_errors: int = 0
    bytes_served: int = 0
    bytes_received: int = 0
    blobs_mounted: int = 0
    shared_reads: int = 0
    shared_bytes_read: int = 0
    shared_writes: int = 0
    shared_bytes_written: int = 0
    shared_writes_skipped: int = 0
    shared_failures: int = 0
    corrupt_objects: int = 0
    base_checks: int = 0
    base_stale_answers: int = 0
    base_pulls: int = 0
    base_bytes_pulled: int = 0

    def snapshot(self) -> dict[str, int]:
        """Return all counters by name."""
        return asdict(self)
