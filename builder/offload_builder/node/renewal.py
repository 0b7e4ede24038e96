"""Keeps the node's certificate fresh while the node runs, and follows the gateway's CAs."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import structlog
from cryptography import x509

from offload_builder.node.enrolment import (
    NodeIdentity,
    needs_renewal,
    save_identity,
    signing_request,
)
from offload_core.errors import AuthenticationError, GatewayUnreachableError, OffloadError
from offload_core.status import error_from_rpc
from offload_core.tls import GATEWAY_NAME, KeyPair, open_channel
from offload_core.trust import fingerprints
from offload_core.versions import call_metadata
from offload_proto.v1.identity_service_pb2 import RenewNodeRequest
from offload_proto.v1.identity_service_pb2_grpc import IdentityServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.config import NodeConfig
    from offload_proto.v1.nodes_service_pb2 import AttachResponse

log = structlog.get_logger(__name__)

RENEW_SECONDS = 20.0
LOOK_SECONDS = 60.0
"""How often the age of the certificate is looked at."""
RETRY_SECONDS = (2.0, 10.0, 60.0, 300.0)
SPREAD_SECONDS = 2.0
"""Nodes that hear of another CA at the same time do not all ask in the same moment."""


class IdentityKeeper:
    """Owns the node's identity while it runs; `run` beside the node.

    Attributes:
        identity: name and keys as they are now.
    """

    def __init__(
        self, config: NodeConfig, identity: NodeIdentity, apply: Callable[[KeyPair], None]
    ) -> None:
        """Hand new keys to `apply`."""
        self.identity = identity
        self._config = config
        self._apply = apply
        self._wanted: tuple[str, ...] = ()
        self._wake = asyncio.Event()

    def take_authorities(self, message: AttachResponse) -> None:
        """Hear which CAs the gateway has; with other ones here a new certificate is asked for."""
        self._wanted = tuple(message.authorities.fingerprints)
        if self._differs():
            self._wake.set()

    async def run(self) -> None:
        """Renew when half of the certificate's life is over, or for other CAs, until cancelled."""
        failures = 0
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
                await asyncio.sleep(random.uniform(0, SPREAD_SECONDS))  # noqa: S311 - no secret
            except TimeoutError:
                pass
            self._wake.clear()
            if not (self._differs() or needs_renewal(self.identity)):
                continue
            try:
                await self._renew()
                failures = 0
            except (OffloadError, OSError) as error:
                delay = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
                log.warning("node.certificate.not_renewed", error=str(error), retry_seconds=delay)
                await asyncio.sleep(delay)
                self._wake.set()

    def _differs(self) -> bool:
        if not self._wanted:
            return False
        keys = self.identity.keys
        return fingerprints(keys.ca_pem) != self._wanted or issuer_of(keys) != self._wanted[0]

    async def _renew(self) -> None:
        keys = self.identity.keys
        request = RenewNodeRequest(
            csr_pem=signing_request(keys.private_key_pem, self.identity.node_id)
        )
        address = self._config.gateway_address()
        async with open_channel(address, GATEWAY_NAME, ca_pem=keys.ca_pem, keys=keys) as channel:
            try:
                reply = await IdentityServiceStub(channel).RenewNode(
                    request, timeout=RENEW_SECONDS, metadata=call_metadata()
                )
            except grpc.RpcError as error:
                raise error_from_rpc(
                    error,  # type: ignore[arg-type]
                    peer=f"the gateway at {self._config.gateway}",
                    unreachable=GatewayUnreachableError,
                ) from error
        fresh = KeyPair(reply.certificate_pem, keys.private_key_pem, reply.ca_pem)
        if not issuer_of(fresh):
            raise AuthenticationError("the gateway answered with a certificate of an unknown CA")
        self.identity = NodeIdentity(self.identity.node_id, fresh)
        folder = self._config.data / "identity"
        await asyncio.to_thread(save_identity, folder, self.identity)
        self._apply(fresh)
        end = x509.load_pem_x509_certificate(fresh.certificate_pem).not_valid_after_utc
        log.info(
            "node.certificate.renewed",
            node_id=self.identity.node_id,
            valid_days=round((end - datetime.now(UTC)).total_seconds() / 86400, 1),
            authorities=len(fingerprints(fresh.ca_pem)),
        )


def issuer_of(keys: KeyPair) -> str:
    """Return the fingerprint of the CA that has signed a certificate; empty for none of its own."""
    from cryptography.exceptions import InvalidSignature

    leaf = x509.load_pem_x509_certificate(keys.certificate_pem)
    authorities = x509.load_pem_x509_certificates(keys.ca_pem)
    for authority, fingerprint in zip(authorities, fingerprints(keys.ca_pem), strict=True):
        try:
            leaf.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return fingerprint
    return ""
