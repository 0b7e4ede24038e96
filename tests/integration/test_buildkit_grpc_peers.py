"""Our HTTP/2 and gRPC against grpcio, as client and as server."""

from __future__ import annotations

import asyncio
import base64
import os
import random
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from offload_builder.buildkit.h2.client import GrpcClient
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.messages import NOT_FOUND, UNAVAILABLE, GrpcError
from offload_builder.buildkit.h2.server import GrpcServer

LIMITS = [
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.max_metadata_size", 4 * 2**20),
    ("grpc.absolute_max_metadata_size", 8 * 2**20),
]
MANY = [("exclude-patterns", f"some/directory/number-{n}") for n in range(3000)]


class Theirs(grpc.GenericRpcHandler):
    """Methods of a grpcio server; messages are plain bytes."""

    def service(self, details):
        kinds = {
            "/t/Echo": grpc.stream_stream_rpc_method_handler(self.echo),
            "/t/Headers": grpc.unary_unary_rpc_method_handler(self.headers),
            "/t/Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "/t/Silent": grpc.unary_unary_rpc_method_handler(self.silent),
        }
        return kinds.get(details.method)

    cancelled = False

    def echo(self, requests, context):
        yield from requests

    def headers(self, request, context):
        count = sum(1 for name, _ in context.invocation_metadata() if name == "exclude-patterns")
        return b"%d" % count

    def fail(self, request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "nö such thing\n")

    def silent(self, request, context):
        import threading

        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(20)
        Theirs.cancelled = True
        return b""


@pytest.fixture
async def client(tmp_path):
    server = grpc.server(ThreadPoolExecutor(4), options=LIMITS, handlers=[Theirs()])
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    async with GrpcClient(tmp_path / "s") as made:
        yield made
    server.stop(0).wait()


async def test_messages_of_all_sizes_come_back_from_grpcio(client):
    messages = [b"", b"x", os.urandom(70_000), os.urandom(16 * 2**20 - 10), *[b"small"] * 3000]
    async with asyncio.timeout(60), await client.call("/t/Echo") as call:

        async def send():
            for message in messages:
                await call.send([message], len(message))
            call.end()

        async def receive():
            got = []
            while some := await call.receive():
                got += some
            return got

        _, got = await asyncio.gather(send(), receive())
    assert got == messages


async def test_grpcio_understands_our_long_header_lists(client):
    async with await client.call("/t/Headers", MANY) as call:
        await call.send([b""], 0)
        call.end()
        assert await call.receive() == [b"3000"]


async def test_the_status_of_grpcio_is_understood(client):
    with pytest.raises(GrpcError) as caught:
        await client.unary("/t/Fail", b"")
    error = caught.value
    assert (error.code, error.message) == (NOT_FOUND, "nö such thing\n")
    assert error.details == b"\x08\x05"


async def test_cancelling_reaches_grpcio(client):
    calling = asyncio.create_task(client.unary("/t/Silent", b""))
    await asyncio.sleep(0.2)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    async with asyncio.timeout(5):
        while not Theirs.cancelled:
            await asyncio.sleep(0.02)


async def test_an_unknown_method_has_a_status(client):
    with pytest.raises(GrpcError):
        await client.unary("/t/No", b"")


async def test_a_socket_without_a_server_is_unavailable(tmp_path):
    async with GrpcClient(tmp_path / "none") as client:
        with pytest.raises(GrpcError) as caught:
            await client.unary("/t/Echo", b"")
        assert caught.value.code == UNAVAILABLE


async def test_the_connection_is_opened_again_after_a_loss(tmp_path):
    async with GrpcClient(tmp_path / "s") as client:
        for _ in range(2):
            server = grpc.server(ThreadPoolExecutor(2), handlers=[Theirs()])
            server.add_insecure_port(f"unix:{tmp_path}/s")
            server.start()
            assert await client.unary("/t/Headers", b"") == b"0"
            await asyncio.to_thread(server.stop(0).wait)
            await asyncio.sleep(0.05)


async def our_echo(call):
    while messages := await call.receive():
        await call.send(messages)


async def our_headers(call):
    await call.receive_one()
    await call.send([b"%d" % len(call.metadata.get("exclude-patterns", []))])


async def our_failure(call):
    raise GrpcError(NOT_FOUND, "nö such thing\n", b"\x08\x05")


@pytest.fixture
async def theirs(tmp_path):
    """A grpcio client of our server, which normally lives in a session's tunnel."""
    connections: list = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def sink(pieces: list[bytes | memoryview]) -> None:
            writer.writelines(pieces)
            await writer.drain()

        server = GrpcServer(
            {"/t/Echo": our_echo, "/t/Headers": our_headers, "/t/Fail": our_failure},
            lambda *_: None,
        )
        http2 = Http2Connection(sink, client=False, on_stream=server.accept)
        connections.append((http2, server))
        http2.start()
        while data := await reader.read(100_000):
            http2.feed(data)
        await server.close()
        await http2.close()
        writer.close()

    listener = await asyncio.start_unix_server(serve, tmp_path / "o")
    with grpc.insecure_channel(f"unix:{tmp_path}/o", options=LIMITS) as channel:
        yield channel
    await asyncio.sleep(0.05)
    listener.close()
    await listener.wait_closed()


async def test_messages_of_all_sizes_come_back_to_grpcio(theirs):
    messages = [b"", b"x", os.urandom(70_000), os.urandom(16 * 2**20 - 10), *[b"small"] * 3000]
    echo = theirs.stream_stream("/t/Echo")
    got = await asyncio.to_thread(lambda: list(echo(iter(messages), timeout=60)))
    assert got == messages


async def test_we_understand_long_header_lists_of_grpcio(theirs):
    ask = theirs.unary_unary("/t/Headers")
    for _ in range(2):
        answer = await asyncio.to_thread(lambda: ask(b"", metadata=MANY, timeout=20))
        assert answer == b"3000"


async def test_grpcio_understands_our_status(theirs):
    ask = theirs.unary_unary("/t/Fail")
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(lambda: ask(b"", timeout=20))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "nö such thing\n"
    trailers = {m.key: m.value for m in caught.value.trailing_metadata()}
    value = trailers["grpc-status-details-bin"]
    assert value in {b"\x08\x05", base64.b64encode(b"\x08\x05")}


async def test_many_calls_at_once_with_some_cancelled_do_not_mix(client):
    """Calls of random sizes and lengths on one connection, against grpcio as the server."""
    chosen = random.Random(11)

    async def one(number: int) -> int:
        messages = [
            number.to_bytes(4) + chosen.randbytes(chosen.choice((0, 10, 20_000, 300_000)))
            for _ in range(chosen.randrange(1, 12))
        ]
        leave_after = chosen.choice((None, None, 1))
        got: list[bytes] = []
        async with await client.call("/t/Echo") as call:

            async def send() -> None:
                for message in messages:
                    await call.send([message[:3], message[3:]], len(message))
                call.end()

            sending = asyncio.ensure_future(send())
            try:
                while some := await call.receive():
                    got += some
                    if leave_after is not None and len(got) >= leave_after:
                        break
            finally:
                sending.cancel()
                await asyncio.wait((sending,))
        assert got == messages[: len(got)]
        assert leave_after is not None or len(got) == len(messages)
        return len(got)

    async with asyncio.timeout(60):
        # grpcio's server has four threads: more calls wait for their turn.
        counts = await asyncio.gather(*(one(number) for number in range(40)))
    assert min(counts) > 0


async def test_many_calls_of_grpcio_at_once_with_some_cancelled_do_not_mix(theirs):
    chosen = random.Random(12)

    def one(number: int) -> None:
        messages = [
            number.to_bytes(4) + chosen.randbytes(chosen.choice((0, 10, 20_000, 300_000)))
            for _ in range(chosen.randrange(1, 12))
        ]
        call = theirs.stream_stream("/t/Echo")(iter(messages), timeout=60)
        if number % 3 == 0:
            assert next(call) == messages[0]
            call.cancel()
        else:
            assert list(call) == messages

    with ThreadPoolExecutor(8) as pool:
        await asyncio.gather(
            *(asyncio.get_running_loop().run_in_executor(pool, one, number) for number in range(40))
        )


async def test_a_method_that_is_not_offered_is_unimplemented(theirs):
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(lambda: theirs.unary_unary("/t/No")(b"", timeout=20))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
