"""Doors to engines: where connections of members to the engine of a session begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from offload_builder.node.sessions.guard.creation import MAX_BODY, read_creation
from offload_builder.node.sessions.guard.images import SessionImages
from offload_builder.node.sessions.guard.stream import Exchange, GuardedStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.sessions.contract import Engine, SessionPlace
    from offload_builder.node.sessions.guard.images import ImageSources
    from offload_builder.node.sessions.guard.stream import Handler
    from offload_core.enginehttp import RequestHead


class Models(Protocol):
    """The model files of projects."""

    async def prepare(self, engine: Engine, place: SessionPlace) -> None:
        """Have the volume with them in an engine before a container mounts it."""


class Doors:
    """Makes doors (`contract.OpenEngineDoor`).

    Args:
        sources: images that the node has.
        models: of projects.
        registry_of: returns HOST:PORT of the node's registry for an engine.
    """

    def __init__(
        self, sources: ImageSources, models: Models, registry_of: Callable[[str], str]
    ) -> None:
        self._sources = sources
        self._models = models
        self._registry_of = registry_of

    def __call__(self, engine: Engine, place: SessionPlace) -> GuardedDoor:
        """Return the door to an engine."""
        registry = self._registry_of(engine.engine_id)
        images = SessionImages(self._sources, place, engine.socket, registry)
        return GuardedDoor(engine, place, images, self._models)


class GuardedDoor:
    """The door to one engine; see `Doors`."""

    def __init__(
        self, engine: Engine, place: SessionPlace, images: SessionImages, models: Models
    ) -> None:
        self._engine = engine
        self._place = place
        self._images = images
        self._models = models

    async def open(self) -> GuardedStream:
        """Connect.

        Raises:
            NodeLostError: the engine takes no connections.
        """
        return await GuardedStream.open(self._engine.socket, self._rules)

    def _rules(self, head: RequestHead) -> Handler | None:
        if head.method != "POST":
            return None
        path = head.path
        if path == "/containers/create":
            return self._create
        if path == "/images/create":
            return self._images.pull
        if path.startswith("/images/") and path.endswith("/push"):
            return self._images.push
        return None

    async def _create(self, exchange: Exchange) -> None:
        body = await exchange.read_body(MAX_BODY)
        wish = read_creation(body, self._engine.devices)
        if wish.models:
            await self._models.prepare(self._engine, self._place)
        if wish.image:
            await self._images.renew(wish.image)
        await exchange.pass_on(exchange.head.replaced(body_length=len(wish.body)), wish.body)
