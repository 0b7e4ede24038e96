"""What the parts of sessions know of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

MODELS_VOLUME = "offload-models"
"""Name of the volume with a project's model files."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine with all its containers may have.

    Attributes:
        cpu_millis: thousandths of a processor.
        memory_bytes: of memory.
        disk_bytes: of disk, for images, containers, volumes and synchronised directories.
        pids: processes and threads.
    """

    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine that is wanted.

    Attributes:
        session_id: whose it is.
        project_id: of the session.
        limits: of everything in it.
        devices: by the Container Device Interface, fully qualified.
    """

    session_id: str
    project_id: str
    limits: EngineLimits
    devices: tuple[str, ...] = ()


class SessionNetwork(Protocol):
    """The network of one engine, while it is attached.

    Attributes:
        namespace: path of the network namespace.
        dns: address of the name server for it.
        mtu: of its device, in bytes.
        ipv6: there is a way out for IPv6.
    """

    namespace: Path
    dns: str
    mtu: int
    ipv6: bool


class SessionNetworks(Protocol):
    """Gives engines their networks."""

    def attach(
        self, key: str, users: Path | None = None
    ) -> AbstractAsyncContextManager[SessionNetwork]:
        """Make a network from which nothing can be reached yet, while the context is open.

        Args:
            key: names it.
            users: path of the user namespace whose root may set it up; None for this process's.

        Raises:
            ConfigError: the machine does not allow it.
            QuotaExceededError: the node has no room for more.
        """

    async def assign(self, key: str, project_id: str) -> None:
        """Let it reach what the policy of a project allows, now and whenever that changes.

        Raises:
            NotFoundError: it is not attached.
            OffloadError: it cannot be done; nothing can be reached.
        """


class Engine(Protocol):
    """A docker engine with namespaces of its own.

    Attributes:
        engine_id: names it at the node; engines are made before it is known for which session.
        socket: of its API, for this process.
        pid: of the first process of its namespaces; changes when it was paused meanwhile.
        id_base: user and group of this machine that are root in it.
        version: of the docker engine.
        root: its root file system, as this process reaches it.
        devices: fully qualified.
        log: file with what the engine says, for people who look for a fault.
        ended: done when the engine ends without being asked to, with one sentence.
    """

    engine_id: str
    id_base: int
    version: str
    devices: tuple[str, ...]
    ended: asyncio.Future[str]

    @property
    def socket(self) -> Path: ...  # noqa: D102

    @property
    def pid(self) -> int: ...  # noqa: D102

    @property
    def root(self) -> Path: ...  # noqa: D102

    @property
    def log(self) -> Path: ...  # noqa: D102

    def open_network(self) -> int:
        """Return a descriptor of its network namespace, which the caller closes.

        Raises:
            NodeLostError: it has none any more.
        """

    def disk_used(self) -> int:
        """Return how many bytes of this machine's disk it has."""


class EngineHost(Protocol):
    """Makes engines, keeps some ready, and removes them with everything of theirs."""

    async def create(self, spec: EngineSpec) -> Engine:
        """Return an engine that answers.

        Raises:
            QuotaExceededError: the node has no room for it.
            NodeLostError: it does not start; the sentence says why.
        """

    async def pause(self, engine: Engine) -> None:
        """Stop its processes, containers included; images, containers and volumes stay."""

    async def wake(self, engine: Engine) -> None:
        """Start a paused engine.

        Raises:
            NodeLostError: it does not start.
        """

    async def remove(self, engine_id: str) -> None:
        """Remove everything of an engine; nothing happens when there is nothing."""

    def why_impossible(self) -> str:
        """Return why there can be no engines here, in one sentence; empty when there can."""


@dataclass(frozen=True, slots=True)
class SessionPlace:
    """Whose session an engine is, for what stands between its members and it.

    Attributes:
        session_id: the session.
        project_id: of it.
        owner: member whose it is.
        role: of the owner, for example "member".
        trust_domain: of the owner's builds for which no branch is known.
    """

    session_id: str
    project_id: str
    owner: str
    role: str
    trust_domain: str


class KeptCopies(Protocol):
    """What the life of a session needs of its synchronised directories."""

    async def end(self, session_id: str) -> None:
        """End what works in the namespaces of its engine; the copies stay."""


class EngineStream(Protocol):
    """One connection to the API of an engine; one task reads and one writes at a time."""

    async def write(self, data: bytes, ahead: int = 1 << 20) -> None:
        """Send bytes to the engine.

        Args:
            data: what to send.
            ahead: bytes that the engine may not have taken yet when this returns.

        Raises:
            OSError: it takes no more.
        """

    async def end(self) -> None:
        """Say that nothing more is sent; what the engine has to say still comes."""

    async def read(self, most: int = 1 << 20) -> bytes:
        """Return what the engine says, at most so many bytes; b"" at the end and after `cut`.

        Raises:
            OSError: the connection broke.
        """

    def cut(self) -> None:
        """Let whatever waits for this connection come to its end now."""

    async def close(self) -> None:
        """Let go of it; nobody reads or writes any more."""


class EngineDoor(Protocol):
    """Where connections to the engine of one session begin."""

    async def open(self) -> EngineStream:
        """Connect.

        Raises:
            NodeLostError: the engine takes no connections.
        """


class OpenEngineDoor(Protocol):
    """Makes the door to an engine, once it is known whose it is."""

    def __call__(self, engine: Engine, place: SessionPlace) -> EngineDoor: ...  # noqa: D102


class KeptModels(Protocol):
    """The model files of sessions, which go on to the next ones."""

    async def keep(self, engine: Engine, place: SessionPlace) -> None:
        """Store the files of an engine that runs, while no container uses them."""

    def forget(self, engine_id: str) -> None:
        """Hear that an engine is gone."""
