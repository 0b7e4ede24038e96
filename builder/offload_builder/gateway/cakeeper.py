"""Follows the replacement of the CA while the gateway runs: files, certificates, nodes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway import caset
from offload_builder.gateway.audit import GATEWAY, AuditLog, Event
from offload_core.errors import OffloadError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.ca import CertificateAuthority
    from offload_builder.gateway.credentials import RenewingCredentials
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry

log = structlog.get_logger(__name__)

POLL_SECONDS = 2.0
WARN_SECONDS = 600.0


class CaKeeper:
    """Takes over what `offload-builder ca` writes, and lets the new CA sign when it is time."""

    def __init__(
        self,
        authority: CertificateAuthority,
        credentials: RenewingCredentials,
        nodes: NodeRegistry,
        audit: AuditLog,
    ) -> None:
        self._authority = authority
        self._credentials = credentials
        self._nodes = nodes
        self._audit = audit
        self._warned_at = 0.0

    async def greet(self, node: AttachedNode) -> None:
        """Tell a node that has just attached which CAs there are."""
        node.post(self._message())

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await asyncio.to_thread(self._switch_if_due, self._behind())
                if await asyncio.to_thread(self._authority.refresh):
                    self._changed()
            except (OffloadError, OSError) as error:
                log.error("ca.unusable", exc_info=error)

    def _changed(self) -> None:
        self._credentials.renew()
        message = self._message()
        told = [node.node_id for node in self._nodes.connected() if node.post(message)]
        fingerprints = [item[:16] for item in self._authority.fingerprints()]
        log.info("ca.changed", trusted=fingerprints, nodes=told)
        detail = f"trusted are now {', '.join(fingerprints)}; the first one signs"
        self._audit.note(Event("ca.changed", role=GATEWAY, detail=detail))

    def _behind(self) -> list[str]:
        """Return the nodes that are here and do not yet trust every CA."""
        wanted = set(self._authority.fingerprints())
        return [
            node.node_id
            for node in self._nodes.connected()
            if not wanted <= set(node.heartbeat.authorities)
        ]

    def _switch_if_due(self, behind: list[str]) -> None:
        rotation = self._authority.rotation
        now = time.time()
        if rotation is None or rotation.switched_at or rotation.switch_at > now:
            return
        if behind:
            if now - self._warned_at > WARN_SECONDS:
                self._warned_at = now
                log.warning("ca.switch.waits", nodes=behind)
            return
        directory = self._authority.directory
        with caset.locked(directory):
            found = caset.read(directory)
            if found.rotation == rotation:
                caset.switch(directory, found, dataclasses.replace(rotation, switched_at=now))

    def _message(self) -> nodes_pb.AttachResponse:
        fingerprints = self._authority.fingerprints()
        return nodes_pb.AttachResponse(
            authorities=nodes_pb.TrustedAuthorities(fingerprints=fingerprints)
        )
