"""The containers of a session that have something of this machine: ports, directories.

They are kept in a file, so that a helper that was started again knows them. Only what a docker
client of this machine has asked for is in it; nothing that the node says gets there.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from offload_client.sessions.portspecs import Binding
from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from pathlib import Path

MAX_CONTAINERS = 2000
_SHORTEST_PREFIX = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


@dataclass(frozen=True, slots=True)
class Source:
    """A directory or file of this machine in a container.

    Attributes:
        path: on this machine.
        read_only: the container cannot change it.
    """

    path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class KnownContainer:
    """A container that was created here.

    Attributes:
        container_id: whole.
        name: as the person chose it; may be empty.
        bindings: its ports.
        publish_all: the engine chooses ports for what its image exposes.
        sources: its directories.
        auto_remove: it goes when it ends, and when it cannot be started.
    """

    container_id: str
    name: str
    bindings: tuple[Binding, ...] = ()
    publish_all: bool = False
    sources: tuple[Source, ...] = ()
    auto_remove: bool = False

    @property
    def ports(self) -> bool:
        """Whether something is published."""
        return bool(self.bindings) or self.publish_all


class KnownContainers:
    """All of them, with their file."""

    def __init__(self, path: Path) -> None:
        """Read the file; one that is broken counts as none."""
        self._path = path
        self._by_id: dict[str, KnownContainer] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for values in json.loads(path.read_bytes()):
                made = KnownContainer(
                    values["container_id"],
                    values["name"],
                    tuple(Binding(**binding) for binding in values["bindings"]),
                    values["publish_all"],
                    tuple(Source(**source) for source in values["sources"]),
                    bool(values.get("auto_remove")),
                )
                self._by_id[made.container_id] = made

    def find(self, key: str) -> KnownContainer | None:
        """Return the container that a client means by an id, the beginning of one, or a name."""
        if key in self._by_id:
            return self._by_id[key]
        name = key.removeprefix("/")
        for known in self._by_id.values():
            if known.name and known.name == name:
                return known
        if len(key) >= _SHORTEST_PREFIX:
            found = [known for known in self._by_id.values() if known.container_id.startswith(key)]
            if len(found) == 1:
                return found[0]
        return None

    def has(self, container_id: str) -> bool:
        """Return whether one has this whole id."""
        return container_id in self._by_id

    def by_id(self, container_id: str) -> KnownContainer | None:
        """Return the container of a whole id."""
        return self._by_id.get(container_id)

    def add(self, known: KnownContainer) -> None:
        """Keep one in mind."""
        self._by_id[known.container_id] = known
        while len(self._by_id) > MAX_CONTAINERS:
            del self._by_id[next(iter(self._by_id))]
        self._write()

    def rename(self, container_id: str, name: str) -> None:
        """Take a container's new name; one that no engine allows is not taken."""
        known = self._by_id.get(container_id)
        name = name.removeprefix("/")
        if known is not None and _NAME.fullmatch(name):
            self.add(replace(known, name=name))

    def forget_name(self, name: str) -> None:
        """Forget whoever had a name that another container has now."""
        for known in [known for known in self._by_id.values() if known.name == name]:
            self.remove(known.container_id)

    def ids(self) -> set[str]:
        """Return the ids of all."""
        return set(self._by_id)

    def remove(self, container_id: str) -> None:
        """Forget one; nothing happens when it is not known."""
        if self._by_id.pop(container_id, None) is not None:
            self._write()

    def promised(self, protocol: str, port: int) -> bool:
        """Return whether a port was given to one of them, perhaps not started yet."""
        return any(
            binding.port == port and binding.protocol == protocol
            for known in self._by_id.values()
            for binding in known.bindings
        )

    def sources(self) -> set[Source]:
        """Return all directories that they have."""
        return {source for known in self._by_id.values() for source in known.sources}

    def _write(self) -> None:
        # Without it, a helper that is started again opens no ports but those of the engine.
        with contextlib.suppress(OSError):
            text = json.dumps([asdict(known) for known in self._by_id.values()])
            replace_small_file(self._path, text.encode())
