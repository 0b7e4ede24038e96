"""A connector at work: it stays connected to the gateway, and answers its calls."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from typing import TYPE_CHECKING

import grpc

from offload_client.connect.carrying import carry, open_connection
from offload_core.aio import TaskSet, stop
from offload_core.errors import (
    AuthenticationError,
    GatewayUnreachableError,
    NodeLostError,
    OffloadError,
    QuotaExceededError,
)
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1.connector_service_pb2 import (
    CallRefused,
    ConnectorHello,
    Destination,
    ServeRequest,
)
from offload_proto.v1.connector_service_pb2_grpc import ConnectorServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from grpc import aio

    from offload_client.connect import allowed
    from offload_client.connect.report import ConnectorReport
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings
    from offload_proto.v1.connector_service_pb2 import ConnectorCall

MAX_CONNECTIONS = 256
"""Connections that are open at the same time."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_LASTING_SECONDS = 30.0
"""A stream that was open for so long was no failure."""
_OUTBOX_MESSAGES = 2 * MAX_CONNECTIONS


class ConnectorSession:
    """One `offload connect`.

    Args:
        invocation: the command.
        settings: gateway and project.
        connections: to the gateway and to nodes.
        places: where connections go, by what builds ask for.
        name: of the connector.
        report: hears of everything.
    """

    def __init__(
        self,
        invocation: Invocation,
        settings: Settings,
        connections: Connections,
        places: Mapping[allowed.Destination, allowed.Destination],
        name: str,
        report: ConnectorReport,
    ) -> None:
        self._invocation = invocation
        self._settings = settings
        self._connections = connections
        self._places = places
        self._name = name
        self._report = report
        self._outbox: asyncio.Queue[ServeRequest] = asyncio.Queue(_OUTBOX_MESSAGES)
        self._channels: dict[str, aio.Channel] = {}
        self._numbers = 0
        self._open = 0
        self._welcome = False

    async def run(self) -> None:
        """Serve until cancelled; come back after every loss.

        Raises:
            OffloadError: the first attempt fails, or the gateway wants no more of us.
        """
        failures, ever = 0, False
        tasks = TaskSet(self._report.crashed)
        try:
            while True:
                self._welcome, began = False, time.monotonic()
                try:
                    await self._serve(tasks)
                    error: OffloadError = GatewayUnreachableError("the gateway ended the stream")
                except OffloadError as known:
                    error = known
                if not self._again(error, ever):
                    raise error
                ever = ever or self._welcome
                lasting = self._welcome and time.monotonic() - began > _LASTING_SECONDS
                failures = 0 if lasting else failures + 1
                delay = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                delay *= random.uniform(0.7, 1.3)  # noqa: S311 - so that not all come at once
                self._report.lost(error, delay)
                await asyncio.sleep(delay)
        finally:
            await tasks.close()

    def _again(self, error: OffloadError, ever: bool) -> bool:
        """Return whether it makes sense to connect again."""
        if isinstance(error, AuthenticationError):
            # A login of an hour has ended meanwhile; the next attempt renews it.
            return self._welcome
        lost = isinstance(error, (GatewayUnreachableError, NodeLostError, QuotaExceededError))
        return lost and (ever or self._welcome)

    async def _serve(self, tasks: TaskSet) -> None:
        gateway = self._settings.gateway
        identity = await self._connections.identity(self._invocation, gateway)
        channel = await self._connections.gateway(gateway, identity)
        self._outbox = asyncio.Queue(_OUTBOX_MESSAGES)
        # The login may be another one than before.
        self._channels.clear()
        call = ConnectorServiceStub(channel).Serve(self._requests(), metadata=call_metadata())
        try:
            async for message in call:
                if message.WhichOneof("message") == "welcome":
                    self._welcome = True
                    self._report.welcome(message.welcome)
                elif message.WhichOneof("message") == "call":
                    tasks.start(self._answer(message.call, identity), name="connection")
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer=f"the gateway at {gateway}",
                unreachable=GatewayUnreachableError,
            ) from error
        finally:
            call.cancel()

    async def _requests(self) -> AsyncIterator[ServeRequest]:
        hello = ConnectorHello(
            project_id=self._settings.project,
            name=self._name,
            destinations=[Destination(host=host, port=port) for host, port in self._places],
        )
        yield ServeRequest(hello=hello)
        outbox = self._outbox
        while True:
            yield await outbox.get()

    async def _answer(self, call: ConnectorCall, identity: StoredIdentity) -> None:
        target = (call.destination.host, call.destination.port)
        self._numbers += 1
        number = self._numbers
        place = self._places.get(target)
        if place is None:
            self._refuse(call, number, "the connector does not allow it")
            return
        if self._open >= MAX_CONNECTIONS:
            many = f"the connector has {MAX_CONNECTIONS} connections open already"
            self._refuse(call, number, many)
            return
        self._open += 1
        try:
            await self._connect(call, number, place, identity)
        finally:
            self._open -= 1

    async def _connect(
        self,
        call: ConnectorCall,
        number: int,
        place: allowed.Destination,
        identity: StoredIdentity,
    ) -> None:
        # Both take a round trip or more, and neither needs the other.
        dialling = asyncio.ensure_future(self._channel(call, identity))
        try:
            connection = await open_connection(*place)
        except (OSError, UnicodeError) as error:
            await stop(dialling, expected=(Exception,))
            why = "it does not answer" if isinstance(error, TimeoutError) else _reason(error)
            self._refuse(call, number, f'the connector "{self._name}" cannot connect: {why}')
            return
        except BaseException:
            await stop(dialling, expected=(Exception,))
            raise
        try:
            channel = await dialling
        except BaseException:
            connection.close()
            raise
        if channel is None:
            connection.close()
            self._refuse(call, number, f'the connector "{self._name}" cannot reach the node')
            return
        began = time.monotonic()
        self._report.opened(number, call.destination)
        try:
            carried = await carry(channel, call.call_id, connection)
        except NodeLostError as error:
            self._report.broken(number, call.destination, error)
            return
        self._report.closed(number, call.destination, carried, time.monotonic() - began)

    async def _channel(self, call: ConnectorCall, identity: StoredIdentity) -> aio.Channel | None:
        """Return a channel to a node: the one that worked last, so that nothing is tried again."""
        kept = self._channels.get(call.server_name)
        if kept is not None and kept.get_state() is grpc.ChannelConnectivity.READY:
            return kept
        found = await self._connections.connect(call.endpoints, call.server_name, identity)
        if found is not None:
            self._channels[call.server_name] = found
        return found

    def _refuse(self, call: ConnectorCall, number: int, reason: str) -> None:
        self._report.refused(number, call.destination, reason)
        refused = CallRefused(call_id=call.call_id, reason=reason)
        if not self._outbox.full():
            self._outbox.put_nowait(ServeRequest(refused=refused))


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        # asyncio puts the address into its text; codes of name resolution are none of the system.
        named = isinstance(error, socket.gaierror)
        text = error.strerror or text if named else os.strerror(error.errno)
    return text[:1].lower() + text[1:]
