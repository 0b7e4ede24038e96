"""What one build has of the pool's cache: what it may read, and what it adds for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_builder.node.solveplan import NameRewriter, cache_entry_key
from offload_cache.contributions import Writer
from offload_cache.registry.grants import EXPORT_TAG, IMAGE, IMPORT_TAG, Grant
from offload_proto.v1.builds_service_pb2 import CacheState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_builder.node.project import ProjectRuntime
    from offload_cache.offers import Offer
    from offload_cache.registry.grants import Exported, Registry
    from offload_proto.v1.build_spec_pb2 import BuildSpec
    from offload_proto.v1.builds_service_pb2 import Ticket

log = structlog.get_logger(__name__)

PUBLISH_SECONDS = 600.0


class BuildCache:
    """One build's place at the node's registry, from `open` until `close`.

    Attributes:
        state: what became of what the build adds.
        entry_key: under which others find that; empty before `open`.
        capability: the secret part of the build's names at the registry; empty before `open`.
        imports: whether BuildKit is to read what the pool offers.
    """

    def __init__(
        self,
        ticket: Ticket,
        spec: BuildSpec,
        runtime: ProjectRuntime,
        registry: Registry,
        registry_address: str,
    ) -> None:
        self.state: CacheState.ValueType = CacheState.CACHE_STATE_UNSPECIFIED
        self.entry_key = ""
        self.capability = ""
        self.imports = False
        self._ticket = ticket
        self._spec = spec
        self._runtime = runtime
        self._registry = registry
        self._address = registry_address
        self._readable: NameRewriter
        self._has_own_key = False

    def open(self) -> None:
        """Let BuildKit read and write what the ticket allows."""
        spec, ticket = self._spec, self._ticket
        self.entry_key = cache_entry_key(spec, self._runtime.native_platform)
        self.capability = self._registry.grant(
            Grant(
                cache=self._runtime.cache,
                read_scopes=tuple(ticket.read_scopes),
                write_scope=ticket.write_scope or None,
                entry_key=self.entry_key,
                writer=Writer(
                    build_id=ticket.build_id,
                    member=ticket.member,
                    role=ticket.role,
                    node_id=ticket.node_id,
                    branch=ticket.vcs_branch,
                    revision=ticket.vcs_revision,
                ),
                may_import=not spec.no_cache,
                results=self._runtime.own_results,
            )
        )
        self._readable = NameRewriter(self._address, self.capability)

    async def close(self) -> None:
        """Take the build's names away again."""
        await self._registry.revoke(self.capability)

    # Names at the registry.

    @property
    def import_name(self) -> str:
        """Where BuildKit reads what the pool offers."""
        return f"{self._address}/{self.capability}/cache:{IMPORT_TAG}"

    @property
    def export_name(self) -> str:
        """Where BuildKit writes what the build adds."""
        return f"{self._address}/{self.capability}/cache:{EXPORT_TAG}"

    @property
    def image_name(self) -> str:
        """Where BuildKit writes images and the caches that belong to the client."""
        return f"{self._address}/{self.capability}/{IMAGE}"

    def written(self) -> list[Exported]:
        """Return what BuildKit has written so far."""
        return self._registry.exports(self.capability)

    def readable(self, text: str) -> str:
        """Return a text without the capability."""
        return self._readable(text) if self.capability else text

    def readable_values(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return an exporter response without the capability."""
        return self._readable.response(values)

    # Import.

    async def offer(self, *, after_fault: bool = False, patient: bool = True) -> Offer | None:
        """Return what can be imported; whatever goes wrong with the cache is a miss."""
        offers, scopes = self._runtime.cache.offers, tuple(self._ticket.read_scopes)
        try:
            return await offers.offer(
                scopes, self.entry_key, after_fault=after_fault, patient=patient
            )
        except Exception as error:
            log.error("cache.offer.failed", build_id=self._ticket.build_id, exc_info=error)
            return None

    def take(self, offer: Offer | None) -> None:
        """Decide what of an offer BuildKit is to read."""
        spec, scopes = self._spec, tuple(self._ticket.read_scopes)
        self.imports = offer is not None and self._needs(offer)
        if spec.cache_imports:
            self._runtime.own_results.imported()
        self._has_own_key = offer is not None and offer.own_key
        if self._has_own_key and not self.imports and not spec.no_cache:
            self._runtime.cache.scopes.note_use(scopes, self.entry_key)

    def _needs(self, offer: Offer) -> bool:
        if self._spec.no_cache:
            return False
        known = self._runtime.own_results.hold_all(offer.contributions)
        return not known or self._runtime.cache.offers.awaits_news(self._ticket.read_scopes)

    # Export.

    @property
    def is_exported(self) -> bool:
        """Whether others have everything that builds of the entry key made here, or get it now."""
        scope = self._ticket.write_scope
        known = self._has_own_key and self._runtime.exports.is_exported(scope, self.entry_key)
        return bool(scope) and known

    def plan_export(self, *, all_cached: bool) -> bool:
        """Say whether a build that worked has records that others lack, and set `state`."""
        scope, ledger = self._ticket.write_scope, self._runtime.exports
        if not all_cached:
            ledger.ran(self.entry_key)
        if not scope:
            self.state = CacheState.CACHE_STATE_SKIPPED
        elif all_cached and self.is_exported:
            self.state = CacheState.CACHE_STATE_UNCHANGED
        else:
            self.state = CacheState.CACHE_STATE_PENDING
            ledger.begin(scope, self.entry_key)
        return self.state == CacheState.CACHE_STATE_PENDING

    def note_export(self, publications: list[int] | None, *, nothing_new: bool) -> bool:
        """Take the export that was part of the client's solve, and set `state`.

        Args:
            publications: from `exported_within`.
            nothing_new: none was made, because there was nothing to export.

        Returns:
            Whether there is something to wait for with `confirm_published`.
        """
        if not self._ticket.write_scope:
            self.state = CacheState.CACHE_STATE_SKIPPED
        elif publications is None and nothing_new:
            self.state = CacheState.CACHE_STATE_UNCHANGED
        elif publications is None:
            self.export_failed()
        elif not publications:
            self.state = CacheState.CACHE_STATE_UNCHANGED
        else:
            self.state = CacheState.CACHE_STATE_PENDING
        return self.state == CacheState.CACHE_STATE_PENDING

    def exported(self) -> list[int] | None:
        """Hear that BuildKit has ended an export; return the publications, or None of nothing."""
        publications = self._take_export()
        if publications is not None:
            self._runtime.exports.done(self._ticket.write_scope, self.entry_key)
        return publications

    def exported_within(self, *, whole: bool, all_cached: bool) -> list[int] | None:
        """Hear the same of an export that the client's solve brought with it.

        Args:
            whole: all that is new was exported.
            all_cached: no step ran.
        """
        ledger = self._runtime.exports
        if not all_cached:
            ledger.ran(self.entry_key)
        publications = self._take_export()
        if publications is not None:
            note = ledger.made if whole else ledger.failed
            note(self._ticket.write_scope, self.entry_key)
        return publications

    def _take_export(self) -> list[int] | None:
        written = self.written()
        if not any(item.reference == EXPORT_TAG for item in written):
            return None
        for item in written:
            if item.contribution:
                self._runtime.own_results.add(item.contribution)
        return [item.publication for item in written if item.publication is not None]

    def export_failed(self) -> None:
        """Note that others do not get what the build adds; the next build exports it."""
        self._runtime.exports.failed(self._ticket.write_scope, self.entry_key)
        self.state = CacheState.CACHE_STATE_FAILED

    async def confirm_published(self, publications: list[int]) -> None:
        """Wait until every other node can read what was exported; needs nothing that is held."""
        uploads = self._runtime.uploads
        if uploads is not None:
            for number in publications:
                if not await uploads.wait_published(number, PUBLISH_SECONDS):
                    if await uploads.is_pending(number):
                        self.state = CacheState.CACHE_STATE_FAILED
                    else:
                        # It was given up: the next build pushes what turned out to be missing.
                        self.export_failed()
                    return
        self.state = CacheState.CACHE_STATE_PUBLISHED
