"""Connections to gateways and nodes, shared by the commands of one process.

A command in a process of its own opens what it needs and closes it at the end; the resident
helper keeps them, so that the next build pays no TLS handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from offload_client.bytepipe import in_thread
from offload_client.identity import (
    StoredIdentity,
    check_not_ended,
    from_certificate,
    load_identity,
    login,
    needs_renewal,
    save_identity,
)
from offload_core.aio import TaskSet
from offload_core.errors import AuthenticationError, ConfigError, NodeLostError, OffloadError
from offload_core.tls import GATEWAY_NAME, open_channel
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

    from grpc import aio

    from offload_client.invocation import Invocation
    from offload_client.oidc.citokens import TokenSource

MAX_CHANNELS = 32
RENEW_SECONDS = 5.0
CONNECT_SECONDS = 10.0
STAGGER_SECONDS = 0.4
"""How long an address may be silent before the next one is tried as well."""
AGAIN_SECONDS = 0.5
SILENCE_SECONDS = 60.0
RETIRE_SECONDS = 6 * 3600.0
"""Longer than any build that another command may still run over the channel."""


@dataclass
class _Kept:
    channel: aio.Channel
    used_at: float


class Connections:
    """Channels by address, server name and identity."""

    def __init__(
        self, *, persistent: bool = False, options: Sequence[tuple[str, Any]] = ()
    ) -> None:
        """Start without any.

        Args:
            persistent: they outlive a command, so one may be found dead at its next use.
            options: of gRPC, for all channels.
        """
        self.persistent = persistent
        self._options = options
        self._channels: dict[tuple[str, str, str], _Kept] = {}
        self._retired: set[aio.Channel] = set()
        self._closing = TaskSet()
        self._targets: WeakKeyDictionary[aio.Channel, tuple[str, str, StoredIdentity]] = (
            WeakKeyDictionary()
        )
        self._token_logins: dict[tuple[str, str], StoredIdentity] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._closing.close()
        for channel in self._retired:
            await channel.close()
        while self._channels:
            _, kept = self._channels.popitem()
            await kept.channel.close()

    async def identity(
        self,
        invocation: Invocation,
        gateway: str,
        *,
        stale: Callable[[StoredIdentity], bool] = needs_renewal,
    ) -> StoredIdentity:
        """Return who the command acts as at a gateway.

        Args:
            invocation: the command.
            gateway: HOST:PORT.
            stale: says of a stored certificate whether it is renewed first.

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
        return await self._stored_or_of_pipeline(invocation, gateway, stale)

    async def _stored_or_of_pipeline(
        self, invocation: Invocation, gateway: str, stale: Callable[[StoredIdentity], bool]
    ) -> StoredIdentity:
        from offload_client.oidc.citokens import find_source

        source = find_source(invocation)
        try:
            # In a thread: a keyring may ask the person to unlock it.
            identity = await in_thread(
                lambda: load_identity(invocation, gateway, ended_too=True), name="identity"
            )
        except AuthenticationError:
            if source is None:
                raise
            return await self._of_pipeline(invocation, gateway, source)
        origin = identity.origin
        if source is not None and origin is not None and origin.job != source.job:
            # Another job, or a person, has logged in here; each job acts as itself.
            return await self._of_pipeline(invocation, gateway, source)
        if not stale(identity):
            return identity
        if origin is not None:
            return await self._renew_at_provider(invocation, gateway, identity)
        check_not_ended(identity, gateway)
        return await self._renew(invocation, gateway, identity)

    async def _of_pipeline(
        self, invocation: Invocation, gateway: str, source: TokenSource
    ) -> StoredIdentity:
        from offload_client.oidc.renewal import automatic_login

        key = gateway, f"{source.name} {source.job}"
        known = self._token_logins.get(key)
        if known is None or needs_renewal(known):
            try:
                known = await automatic_login(invocation, gateway, source)
            except OffloadError:
                if known is None or known.expires_at <= time.time():
                    raise
                return known
            self._token_logins[key] = known
        return known

    async def _renew_at_provider(
        self, invocation: Invocation, gateway: str, identity: StoredIdentity
    ) -> StoredIdentity:
        from offload_client.oidc.renewal import renewed

        try:
            return await renewed(invocation, gateway, identity)
        except OffloadError as error:
            if identity.expires_at > time.time():
                # It still works; the next command tries again.
                return identity
            raise AuthenticationError(
                f"your login at {gateway} has expired: {error.message}",
                hint=f"run 'offload login https://{gateway}'",
            ) from error

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
        # Where it cannot be kept, the next command renews again.
        with contextlib.suppress(ConfigError):
            save_identity(invocation, gateway, fresh)
        return fresh

    async def gateway(self, address: str, identity: StoredIdentity) -> aio.Channel:
        """Return a channel to a gateway."""
        return await self.channel(address, GATEWAY_NAME, identity)

    async def channel(
        self, address: str, server_name: str, identity: StoredIdentity
    ) -> aio.Channel:
        """Return a channel to a gateway or node, opened now or kept from before."""
        import grpc

        key = (address, server_name, identity.cache_key())
        kept = self._channels.pop(key, None)
        if kept is not None:
            state = kept.channel.get_state()
            failed = state in (
                grpc.ChannelConnectivity.TRANSIENT_FAILURE,
                grpc.ChannelConnectivity.SHUTDOWN,
            )
            # After a long silence, or when the machine has slept, something on the way may have
            # forgotten the connection without telling; a handshake is cheaper than to find out.
            if failed or _now() - kept.used_at > SILENCE_SECONDS:
                self._retire(kept.channel)
                kept = None
        if kept is None:
            channel = open_channel(
                address,
                server_name,
                ca_pem=identity.keys.ca_pem,
                keys=identity.keys,
                options=self._options,
            )
            self._targets[channel] = address, server_name, identity
            kept = _Kept(channel, 0.0)
        kept.used_at = _now()
        self._channels[key] = kept
        while len(self._channels) > MAX_CHANNELS:
            oldest = next(iter(self._channels))
            self._retire(self._channels.pop(oldest).channel)
        return kept.channel

    async def connect(
        self, addresses: Sequence[str], server_name: str, identity: StoredIdentity
    ) -> aio.Channel | None:
        """Return a channel to the first address that answers, None when none does in 10 seconds.

        They are tried in order; the next one as soon as one has failed or is slow, as RFC 8305
        does it for the addresses of a name.
        """
        deadline = _now() + CONNECT_SECONDS
        while True:
            channel = await self._race(addresses, server_name, identity, deadline)
            if channel is not None or _now() + AGAIN_SECONDS >= deadline:
                return channel
            # Everything refused at once: whoever restarts may be back in a moment.
            deadline = min(deadline, _now() + AGAIN_SECONDS + STAGGER_SECONDS)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _race(
        self, addresses: Sequence[str], server_name: str, identity: StoredIdentity, deadline: float
    ) -> aio.Channel | None:
        waiting = list(addresses)
        attempts: dict[asyncio.Task[bool], tuple[str, aio.Channel]] = {}
        winner: aio.Channel | None = None
        try:
            while winner is None and (waiting or attempts) and _now() < deadline:
                if waiting:
                    address = waiting.pop(0)
                    channel = await self.channel(address, server_name, identity)
                    task = asyncio.ensure_future(_is_ready(channel))
                    attempts[task] = address, channel
                patience = STAGGER_SECONDS if waiting else deadline - _now()
                done, _ = await asyncio.wait(
                    attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    address, channel = attempts.pop(task)
                    if task.result():
                        winner = winner or channel
                    else:
                        self.drop(address, server_name, identity)
        finally:
            for task, (address, _) in attempts.items():
                task.cancel()
                self.drop(address, server_name, identity)
        return winner

    @asynccontextmanager
    async def beside(self, channel: aio.Channel) -> AsyncIterator[aio.Channel]:
        """Open another connection to where a channel of ours leads; closed with the block.

        Channels to one address share a connection, so that several calls are as fast as one on a
        long way.

        Raises:
            NodeLostError: there is none within 10 seconds.
        """
        address, server_name, identity = self._targets[channel]
        another = open_channel(
            address,
            server_name,
            ca_pem=identity.keys.ca_pem,
            keys=identity.keys,
            options=(("grpc.use_local_subchannel_pool", 1),),
        )
        try:
            ready = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    ready = await _is_ready(another)
            if not ready:
                raise NodeLostError(f"there is no further connection to {address}")
            yield another
        finally:
            await another.close()

    def drop(self, address: str, server_name: str, identity: StoredIdentity) -> None:
        """Forget a channel that does not work; calls of other commands on it may end first."""
        kept = self._channels.pop((address, server_name, identity.cache_key()), None)
        if kept is not None:
            self._retire(kept.channel)

    def discard(self, channel: aio.Channel) -> None:
        """Forget a channel of ours; calls on it may end first."""
        kept = next((key for key, kept in self._channels.items() if kept.channel is channel), None)
        if kept is not None:
            del self._channels[kept]
            self._retire(channel)

    def _retire(self, channel: aio.Channel) -> None:
        self._retired.add(channel)

        async def close() -> None:
            await channel.close(RETIRE_SECONDS)
            self._retired.discard(channel)

        self._closing.start(close(), name="close-channel")


async def _is_ready(channel: aio.Channel) -> bool:
    import grpc

    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state in (
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        ):
            return False
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return True


def _now() -> float:
    """Return seconds of a clock that also counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
