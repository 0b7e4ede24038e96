"""The calls with which a client was the frontend of its build, made once more for another attempt.

docker buildx asks BuildKit to run a frontend and then says that the outcome is the result of its
build. When that build fails for what is BuildKit's own affair, the client need not take part
again: the same calls say the same. Only the names of file systems, which BuildKit makes anew, have
to be put in the place of the former ones. Source: BuildKit client/build.go and
frontend/gateway/gateway.go; names are those of BuildKit's identity package, all of one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from offload_builder.buildkit.h2.messages import INTERNAL, GrpcError, MessageReader
from offload_proto.buildkit import gateway_pb2 as gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from offload_builder.buildkit.h2.headers import HeaderList

    Ask = Callable[[HeaderList, bytes], Awaitable[tuple[bytes, GrpcError | None]]]


MAX_KEPT_BYTES = 4 << 20
"""Of one build's calls; a Dockerfile's are some kilobytes. With more, it is not repeated."""


class FrontendReplay:
    """What a client has said as the frontend of one build."""

    def __init__(self) -> None:
        self._solves: list[tuple[HeaderList, bytes, list[str]]] = []
        self._end: tuple[HeaderList, bytes] | None = None
        self._complete = True
        self._bytes = 0

    @property
    def possible(self) -> bool:
        """Whether all that was said can be said once more."""
        return self._complete

    def solved(self, headers: HeaderList, request: bytes, answer: bytes) -> None:
        """Note a frontend that has run: the client's request, and BuildKit's answer."""
        if not self._has_room(request):
            return
        try:
            self._solves.append((headers, request, list(_names(answer))))
        except (DecodeError, GrpcError):
            self.other()

    def returned(self, headers: HeaderList, request: bytes) -> None:
        """Note the client's word on what the result is."""
        if self._has_room(request):
            self._end = (headers, request)

    def other(self) -> None:
        """Note a call that cannot be made once more."""
        self._complete = False
        self._solves.clear()
        self._end = None

    def _has_room(self, request: bytes) -> bool:
        """Whether a call can be kept; what is not complete needs nothing."""
        self._bytes += len(request)
        if self._complete and self._bytes > MAX_KEPT_BYTES:
            self.other()
        return self._complete

    async def run(self, ask: Ask, changed: Callable[[bytes], bytes]) -> None:
        """Say all of it again, to another attempt of the same build.

        Args:
            ask: makes a call with these headers and this message; returns its answer and its error.
            changed: makes BuildKit's request of the client's.

        Raises:
            GrpcError: BuildKit takes the result of the build no more, or answers wrongly.
            OffloadError: as `changed`.
        """
        if self._end is None:
            return
        headers, end = self._end
        for solve_headers, request, former in self._solves:
            answer, error = await ask(solve_headers, changed(request))
            if error is not None:
                status = error.details or Status(code=error.code, message=error.message)
                data = status if isinstance(status, bytes) else status.SerializeToString()
                end = gateway.ReturnRequest(error=data).SerializeToString()
                break
            end = _renamed(end, former, list(_names(answer)))
        _, error = await ask(headers, end)
        if error is not None:
            raise error


def _names(answer: bytes) -> Iterator[str]:
    """Yield the names of the file systems in an answer, in an order that is always the same.

    Raises:
        DecodeError, GrpcError: it cannot be read.
    """
    messages = MessageReader().feed(answer)
    if len(messages) != 1:
        raise GrpcError(INTERNAL, "the answer of a frontend cannot be read")
    result = gateway.SolveResponse.FromString(messages[0]).result
    yield result.refDeprecated
    for _, name in sorted(result.refsDeprecated.refs.items()):
        yield name
    yield result.ref.id
    for _, ref in sorted(result.refs.refs.items()):
        yield ref.id
    for _, found in sorted(result.attestations.items()):
        for item in found.attestation:
            yield item.ref.id


def _renamed(message: bytes, former: list[str], names: list[str]) -> bytes:
    if list(map(len, former)) != list(map(len, names)):
        raise GrpcError(INTERNAL, "the frontend has made another kind of result than before")
    for old, new in zip(former, names, strict=True):
        if old:
            # Of the same length, so that everything around it stays as it is.
            message = message.replace(old.encode(), new.encode())
    return message
