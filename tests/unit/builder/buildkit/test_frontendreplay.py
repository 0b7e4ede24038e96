"""A client's calls as the frontend of its build, made once more."""

from __future__ import annotations

import pytest
from google.rpc.status_pb2 import Status

from offload_builder.buildkit.frontendreplay import MAX_KEPT_BYTES, FrontendReplay
from offload_builder.buildkit.h2.messages import GrpcError, message_prefix
from offload_proto.buildkit import gateway_pb2 as gateway

HEADERS = [(":path", "/Solve")]
END_HEADERS = [(":path", "/Return")]


def answer(*names: str) -> bytes:
    result = gateway.Result()
    for place, name in enumerate(names):
        result.refs.refs[f"linux/{place}"].id = name
    result.attestations["linux/0"].attestation.add().ref.id = names[0][::-1]
    message = gateway.SolveResponse(result=result).SerializeToString()
    return message_prefix(len(message)) + message


def end_of(*names: str) -> bytes:
    result = gateway.SolveResponse.FromString(answer(*names)[5:]).result
    # Field 99 stands for what has no name here.
    return gateway.ReturnRequest(result=result).SerializeToString() + b"\x9a\x06\x03abc"


class Daemon:
    """Answers calls and remembers them."""

    def __init__(self, *answers: tuple[bytes, GrpcError | None]) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[str, bytes]] = []

    async def ask(
        self, headers: list[tuple[str, str]], message: bytes
    ) -> tuple[bytes, GrpcError | None]:
        self.heard.append((headers[0][1], message))
        return self.answers.pop(0)


async def test_the_result_has_the_names_of_the_new_attempt() -> None:
    said = FrontendReplay()
    said.solved(HEADERS, b"solve", answer("a1", "b1"))
    said.returned(END_HEADERS, end_of("a1", "b1"))
    daemon = Daemon((answer("x9", "y9"), None), (b"", None))
    await said.run(daemon.ask, lambda request: request + b" without the cache")
    assert daemon.heard == [
        ("/Solve", b"solve without the cache"),
        ("/Return", end_of("x9", "y9")),
    ]


async def test_a_frontend_that_fails_now_ends_the_build_with_its_error() -> None:
    said = FrontendReplay()
    said.solved(HEADERS, b"solve", answer("a1"))
    said.returned(END_HEADERS, end_of("a1"))
    daemon = Daemon((b"", GrpcError(2, "no such target")), (b"", None))
    await said.run(daemon.ask, bytes)
    request = gateway.ReturnRequest.FromString(daemon.heard[1][1])
    assert Status.FromString(request.error).message == "no such target"


async def test_a_result_of_another_kind_is_no_repeat() -> None:
    said = FrontendReplay()
    said.solved(HEADERS, b"solve", answer("a1"))
    said.returned(END_HEADERS, end_of("a1"))
    with pytest.raises(GrpcError, match="another kind"):
        await said.run(Daemon((answer("x9", "y9"), None)).ask, bytes)


async def test_other_calls_cannot_be_made_once_more() -> None:
    said = FrontendReplay()
    assert said.possible
    said.other()
    assert not said.possible
    damaged = FrontendReplay()
    damaged.solved(HEADERS, b"solve", b"\0\0\0\0\x03abc")
    assert not damaged.possible


async def test_a_build_that_says_too_much_is_not_kept() -> None:
    said = FrontendReplay()
    large = b"x" * (MAX_KEPT_BYTES // 2)
    said.solved(HEADERS, large, answer("a1"))
    assert said.possible
    said.solved(HEADERS, large, answer("b1"))
    said.returned(END_HEADERS, end_of("b1"))
    assert not said.possible
    daemon = Daemon()
    await said.run(daemon.ask, bytes)
    assert daemon.heard == []
