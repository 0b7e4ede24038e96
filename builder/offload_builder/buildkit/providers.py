"""What a build needs from the machine that asked for it; implemented by the node's agent.

A session calls these when BuildKit asks. An `OffloadError` that they raise ends the request with
its sentence, and the session keeps it (`BkSession.failure`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from offload_builder.buildkit.contentstore import LayoutBlobs


@dataclass(frozen=True, slots=True)
class StatRun:
    """Some entries of a listing.

    Attributes:
        frames: a STAT packet for each, with the prefix of its gRPC message; see `statframes`.
        count: how many.
    """

    frames: bytes
    count: int


class LocalTree(Protocol):
    """One listing of a local source.

    Entries are numbered from 0 in the order in which `runs` yields them.
    """

    def runs(self) -> AsyncIterator[StatRun]:
        """Yield the entries: a directory is followed by its content, names sorted as bytes.

        They are sent to BuildKit as they come.
        """
        ...

    def content_size(self, index: int) -> int:
        """Return the bytes of a file; -1 of anything that has no content, as a hard link."""
        ...

    async def requested(self, indexes: Sequence[int]) -> None:
        """Hear which files BuildKit wants, before they are read.

        The requests of about two milliseconds come together; the first one of a pause comes
        alone and at once. The files are read after this returns; later calls do not wait for the
        reading of earlier files.
        """
        ...

    def at_hand(self, index: int) -> bytes | memoryview | None:
        """Return the whole content of a small file if nothing has to be waited for.

        A file is given out once, here or by `read`. None says nothing about it: then it is read
        with `read`.
        """
        ...

    def read(self, index: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the content of a file; may wait until it has arrived. Up to 64 run at a time.

        Pieces of 256 KiB to 1 MiB are best. A piece must not be changed after it was yielded.
        """
        ...

    async def delivered(self) -> None:
        """Hear that BuildKit has everything that it wants; `close` follows."""
        ...

    async def close(self) -> None:
        """Hear that the transfer has ended, well or not."""
        ...


class LocalSource(Protocol):
    """The local directories of a build."""

    async def open(
        self, name: str, include: list[str], exclude: list[str], follow: list[str]
    ) -> LocalTree:
        """List a directory.

        Args:
            name: "context", "dockerfile" or the name of a named context.
            include: patterns of which one must match; empty for all.
            exclude: patterns in the syntax of .dockerignore.
            follow: only these paths and what their symbolic links lead to; empty for all.

        Raises:
            NotFoundError: there is no such directory.
        """
        ...


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A token that BuildKit wants for a registry.

    Attributes:
        host: of the registry; Docker Hub is "registry-1.docker.io".
        realm: URL of the token service.
        service: name of the registry there.
        scopes: rights, as "repository:NAME:pull,push".
    """

    host: str
    realm: str
    service: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class TokenAnswer:
    """A token.

    Attributes:
        token: sent as a bearer token.
        life_seconds: how long it is good from now; BuildKit asks again after nine tenths of it.
    """

    token: str
    life_seconds: int


class TokenDeniedError(Exception):
    """There is no token; the text is for BuildKit and holds no secret."""


class CredentialSource(Protocol):
    """Logins at registries."""

    @property
    def authority(self) -> bytes:
        """32 random bytes: sessions that have them in common share their tokens."""
        ...

    async def credentials(self, host: str) -> tuple[str, str]:
        """Return user name and password for a registry; two empty strings for none.

        Asked of registries without a token service only. Docker Hub is "registry-1.docker.io".
        BuildKit waits for 60 seconds.
        """
        ...

    async def token(self, request: TokenRequest) -> TokenAnswer:
        """Return a token for a registry, so that BuildKit never has the login.

        Raises:
            TokenDeniedError: there is none.
        """
        ...


class SecretSource(Protocol):
    """The build's secrets."""

    async def get(self, secret_id: str) -> bytes | None:
        """Return a secret, or None if there is none of this name."""
        ...


class AgentConnection(Protocol):
    """One connection to an SSH agent."""

    async def ask(self, request: bytes) -> bytes:
        """Return the reply to a request; both are whole frames of the agent's protocol.

        Raises:
            OffloadError: the agent cannot be reached.
        """
        ...


class AgentSource(Protocol):
    """The SSH agents that the build may use."""

    def has(self, agent_id: str) -> bool:
        """Return whether there is an agent of a name."""
        ...

    def connect(self, agent_id: str) -> AbstractAsyncContextManager[AgentConnection]:
        """Open a connection for as long as the block runs.

        Raises:
            OffloadError: the agent cannot be reached.
        """
        ...


class OutputWriter(Protocol):
    """Takes the bytes of one result."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes; BuildKit is held back while this waits."""
        ...

    async def close(self) -> None:
        """All bytes have come. Only the end of the solve says whether the result is good."""
        ...

    async def abort(self) -> None:
        """The result will not be completed."""
        ...


class OutputSink(Protocol):
    """The results that go to the client."""

    async def open(self, index: int, metadata: Mapping[str, str]) -> OutputWriter:
        """Begin the result of exporter number `index` of the solve.

        Args:
            index: position in `SolveSpec.exporters`.
            metadata: the exporter's notes, such as "containerimage.digest".
        """
        ...


@dataclass(frozen=True, slots=True)
class SourceUse:
    """Something that BuildKit is about to fetch.

    Attributes:
        identifier: "docker-image://", "git://", "https://", "local://" or another scheme, and its
            place. What a step asks of BuildKit's proxy comes as "https://HOST:PORT/PATH".
        attributes: further parameters, such as "git.fullurl".
    """

    identifier: str
    attributes: Mapping[str, str]


class SourceRules(Protocol):
    """Says what a build may begin with, and what its steps may ask of the proxy."""

    def check(self, use: SourceUse) -> str:
        """Return why something may not be fetched, in one sentence; empty when it may."""
        ...


@dataclass(frozen=True, slots=True)
class SessionProviders:
    """What a session offers; BuildKit is told only of what is set."""

    source: LocalSource | None = None
    credentials: CredentialSource | None = None
    secrets: SecretSource | None = None
    agents: AgentSource | None = None
    outputs: OutputSink | None = None
    layouts: LayoutBlobs | None = None
    rules: SourceRules | None = None
