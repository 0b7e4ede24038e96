"""Connections to gateways and nodes, shared by the commands of one process.

A command in a process of its own opens what it needs and closes it at the end; the resident
helper keeps them, so that the next build pays no TLS handshake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from offload_client.identity import (
    StoredIdentity,
    from_certificate,
    load_identity,
    login,
    needs_renewal,
    save_identity,
)
from offload_core.tls import GATEWAY_NAME, open_channel
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from types import TracebackType

    from grpc import aio

    from offload_client.invocation import Invocation

MAX_CHANNELS = 32
RENEW_SECONDS = 5.0


class Connections:
    """Channels by address, server name and identity."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str, str], aio.Channel] = {}
        self._token_logins: dict[tuple[str, str], StoredIdentity] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()

    async def identity(self, invocation: Invocation, gateway: str) -> StoredIdentity:
        """Return who the command acts as at a gateway.

        Raises:
            AuthenticationError: not logged in, or the token in OFFLOAD_TOKEN is refused.
        """
        token = invocation.environment.get("OFFLOAD_TOKEN")
        if token:
            known = self._token_logins.get((gateway, token))
            if known is None or needs_renewal(known):
                known, _ = await login(gateway, token)
                self._token_logins[(gateway, token)] = known
            return known
        identity = load_identity(invocation, gateway)
        if needs_renewal(identity):
            identity = await self._renew(invocation, gateway, identity)
        return identity

    async def _renew(
        self, invocation: Invocation, gateway: str, identity: StoredIdentity
    ) -> StoredIdentity:
        import grpc

        from offload_proto.v1.identity_service_pb2 import RenewRequest
        from offload_proto.v1.identity_service_pb2_grpc import IdentityServiceStub

        stub = IdentityServiceStub(await self.gateway(gateway, identity))
        try:
            reply = await stub.Renew(
                RenewRequest(), timeout=RENEW_SECONDS, metadata=call_metadata()
            )
        except grpc.RpcError:
            # The old certificate still works; the next call says what is wrong, if anything is.
            return identity
        fresh = from_certificate(reply.certificate)
        save_identity(invocation, gateway, fresh)
        return fresh

    async def gateway(self, address: str, identity: StoredIdentity) -> aio.Channel:
        """Return a channel to a gateway."""
        return await self.channel(address, GATEWAY_NAME, identity)

    async def channel(
        self, address: str, server_name: str, identity: StoredIdentity
    ) -> aio.Channel:
        """Return a channel to a gateway or node, opened now or kept from before."""
        key = (address, server_name, identity.cache_key())
        channel = self._channels.pop(key, None)
        if channel is None:
            channel = open_channel(
                address, server_name, ca_pem=identity.keys.ca_pem, keys=identity.keys
            )
        self._channels[key] = channel
        while len(self._channels) > MAX_CHANNELS:
            oldest = next(iter(self._channels))
            await self._channels.pop(oldest).close()
        return channel

    async def drop(self, address: str, server_name: str, identity: StoredIdentity) -> None:
        """Close a channel that no longer works."""
        channel = self._channels.pop((address, server_name, identity.cache_key()), None)
        if channel is not None:
            await channel.close()
