"""Names that clients choose, of builds and of sessions: each belongs to one connection at a time.

BuildKit finds a build by its name and a session by its identifier, whoever calls. Members can read
the names of builds that run (`buildx history ls`), so without this one client could speak as the
frontend of another one's build, with its secrets.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2.messages import INVALID_ARGUMENT, GrpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

ALREADY_EXISTS = 6
MAX_NAME = 128
"""Characters; BuildKit's own clients use 25."""


class Names:
    """Who uses which names, by project."""

    def __init__(self, what: str) -> None:
        """Set what has the names, for sentences."""
        self._what = what
        self._holders: dict[tuple[str, str], object] = {}

    @contextmanager
    def claimed(self, project_id: str, name: str, holder: object) -> Iterator[None]:
        """Keep a name for a connection as long as the context lasts.

        Raises:
            GrpcError: it is none, or in use.
        """
        self.check(project_id, name, None)
        self._holders[project_id, name] = holder
        try:
            yield
        finally:
            del self._holders[project_id, name]

    def check(self, project_id: str, name: str, holder: object) -> None:
        """Refuse a name that another connection uses.

        Raises:
            GrpcError: it is none, or in use.
        """
        if not name or len(name) > MAX_NAME:
            raise GrpcError(
                INVALID_ARGUMENT, f"the name of a {self._what} has 1 to {MAX_NAME} characters"
            )
        found = self._holders.get((project_id, name))
        if found is not None and found is not holder:
            raise GrpcError(ALREADY_EXISTS, f"there is a {self._what} {name} already")
