"""The interceptor that ends calls of revoked members, at a real gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from offload_builder.gateway.ca import CertificateAuthority
from offload_builder.revocations import RevocationGate, Revocations
from offload_core.interceptors import ErrorInterceptor
from offload_core.servercredentials import ReloadingCredentials
from offload_core.tls import (
    GATEWAY_NAME,
    SERVER_OPTIONS,
    Identity,
    open_channel,
)
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECONDS = 10.0


class Handler(grpc.GenericRpcHandler):
    """One method of each kind; streams go on for ever."""

    def __init__(self) -> None:
        self.running = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def many(requests: object, context: object) -> AsyncIterator[bytes]:
            self.running += 1
            try:
                while True:
                    yield bytes(1 << 20)
            finally:
                self.running -= 1

        async def silent(requests: object, context: object) -> AsyncIterator[bytes]:
            self.running += 1
            try:
                await asyncio.sleep(60)
                yield b""
            finally:
                self.running -= 1

        async def one(request: object, context: object) -> bytes:
            self.running += 1
            try:
                await asyncio.sleep(60)
            finally:
                self.running -= 1
            return b""

        name = handler_call_details.method.rpartition("/")[2]
        return {
            "ServerStream": grpc.unary_stream_rpc_method_handler(many),
            "BothStream": grpc.stream_stream_rpc_method_handler(silent),
            "ClientStream": grpc.stream_unary_rpc_method_handler(one),
            "Unary": grpc.unary_unary_rpc_method_handler(one),
        }[name]


@pytest.mark.parametrize("kind", ["ServerStream", "BothStream", "ClientStream", "Unary"])
async def test_open_call_of_each_kind_ends_also_when_its_client_reads_nothing(tmp_path, kind):
    authority = CertificateAuthority.open(tmp_path)
    keys, _ = authority.issue_member(
        Identity("member", "ann", "aaaa", "member"), datetime.now(UTC) + timedelta(days=1)
    )
    known, handler = Revocations(), Handler()
    server = aio.server(
        interceptors=(RevocationGate(known), ErrorInterceptor("this test")), options=SERVER_OPTIONS
    )
    server.add_generic_rpc_handlers((handler,))
    credentials = ReloadingCredentials(authority.gateway_keys()).server(require_client=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    async with open_channel(
        f"127.0.0.1:{port}", GATEWAY_NAME, ca_pem=authority.ca_pem, keys=keys
    ) as channel:
        methods = {
            "ServerStream": channel.unary_stream,
            "BothStream": channel.stream_stream,
            "ClientStream": channel.stream_unary,
            "Unary": channel.unary_unary,
        }
        method = methods[kind](f"/test/{kind}")
        first = b"" if kind in ("ServerStream", "Unary") else None
        arguments = (first,) if first is not None else ()
        call = method(*arguments, metadata=call_metadata())
        async with asyncio.timeout(SECONDS):
            while not handler.running:
                await asyncio.sleep(0.01)
        # Until what it writes is stuck.
        await asyncio.sleep(0.5)
        known.take({"aaaa": time.time() + 60})
        async with asyncio.timeout(SECONDS):
            while handler.running:
                await asyncio.sleep(0.01)
            with contextlib.suppress(aio.AioRpcError):
                if kind in ("ServerStream", "BothStream"):
                    while await call.read() is not aio.EOF:
                        pass
            code = await call.code()
        allowed = {grpc.StatusCode.UNAUTHENTICATED}
        if kind == "ServerStream":
            # It was in the middle of a message.
            allowed |= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
        assert code in allowed
    await server.stop(None)
