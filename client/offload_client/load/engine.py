"""The user's container engine, spoken to through the docker SDK for Python.

The SDK blocks and takes about 150 ms to import, so it is imported on first use and every call runs
in a thread of its own with a limit.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from offload_client.bytepipe import in_thread, stream_through
from offload_client.load.engineerror import EngineError, translate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from docker import APIClient

    from offload_client.bytepipe import BytePipe
    from offload_client.load.endpoint import Endpoint
    from offload_client.load.names import ImageName
    from offload_client.load.platform import Platform

T = TypeVar("T")

CALL_SECONDS = 60.0
"""Limit of a call that moves no image."""

_ZSTD_API = (1, 45)
"""API of engine 26, the first on which zstd layers in archives were tried with success."""

_PLATFORM_INSPECT_API = (1, 49)
"""API of engine 28.2, the first whose image inspect takes a platform."""


class EngineInfo(NamedTuple):
    """What is known of an engine."""

    engine_id: str
    version: str
    api_version: tuple[int, int]
    containerd_store: bool
    platform: Platform


class EngineImage(NamedTuple):
    """An image in the engine."""

    image_id: str
    layer_count: int


@dataclass(frozen=True)
class RegistryLogin:
    """Login for one pull; the password is masked."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"RegistryLogin(username={self.username!r}, password='***')"


class Engine:
    """One engine for one load; made by `open_engine`."""

    def __init__(
        self, endpoint: Endpoint, calls: APIClient, streams: APIClient, info: EngineInfo
    ) -> None:
        self.endpoint = endpoint
        self.info = info
        self._calls = calls
        self._streams = streams

    def close(self) -> None:
        """Close the idle connections; those in use close at their end."""
        self._calls.close()
        self._streams.close()

    @property
    def reads_zstd_archives(self) -> bool:
        """Whether layers in an archive may stay compressed with zstd."""
        return self.info.api_version >= _ZSTD_API

    @property
    def inspects_platforms(self) -> bool:
        """Whether the engine can tell which platforms of an image it has."""
        return self.info.api_version >= _PLATFORM_INSPECT_API

    async def find_image(
        self, reference: str, platform: Platform | None = None
    ) -> EngineImage | None:
        """Return an image, None when the engine does not have it (for that platform).

        A platform may be given when `inspects_platforms`.
        """

        def inspect() -> EngineImage | None:
            # The SDK's inspect_image knows no platform; its client is a requests session.
            client = self._calls
            response = client.get(
                f"{client.base_url}/v{client.api_version}/images/{reference}/json",
                params={"platform": _platform_json(platform)} if platform is not None else {},
                timeout=CALL_SECONDS,
            )
            if response.status_code == 404:
                return None
            if not response.ok:
                raise EngineError(response.text.strip(), "refused")
            image = response.json()
            layers = (image.get("RootFS") or {}).get("Layers") or []
            return EngineImage(str(image["Id"]), len(layers))

        return await self._call(inspect, "inspect an image")

    async def image_ids(self) -> set[str]:
        """Return the ids of all images."""
        found = await self._call(lambda: self._calls.images(quiet=True), "list images")
        return {str(image_id) for image_id in found}

    async def layer_lists(self) -> list[list[str]]:
        """Return the diff ids of every image, each list from the lowest layer up."""

        def inspect_all() -> list[list[str]]:
            import docker.errors

            inspect: Callable[[str], Any] = self._calls.inspect_image
            lists: list[list[str]] = []
            for image_id in dict.fromkeys(self._calls.images(quiet=True)):
                # An image may be removed by someone while we ask.
                with suppress(docker.errors.NotFound):
                    rootfs = inspect(image_id).get("RootFS") or {}
                    lists.append([str(layer) for layer in rootfs.get("Layers") or []])
            return lists

        return await self._call(inspect_all, "inspect the images")

    async def tag(self, reference: str, name: ImageName) -> None:
        """Give an image a name; an image that had it loses it."""
        await self._call(
            lambda: self._calls.tag(reference, name.repository, name.tag), f"tag {name}"
        )

    async def untag(self, reference: str) -> None:
        """Remove one reference; the image and its parents stay if another names it."""
        await self._call(
            lambda: self._calls.remove_image(reference, noprune=True), f"untag {reference}"
        )

    async def load(
        self, produce: Callable[[BytePipe], Awaitable[None]], on_event: Callable[[], None]
    ) -> None:
        """Stream an archive into POST /images/load.

        Args:
            produce: writes the archive; its error ends the request before the archive is whole,
                so that the engine takes nothing.
            on_event: called for each of the engine's progress messages.

        Raises:
            EngineError: the engine refused the archive or vanished.
        """
        loop = asyncio.get_running_loop()

        def send(pipe: BytePipe) -> None:
            load_image: Callable[..., Any] = self._streams.load_image
            # requests sends any iterable as a chunked body.
            events = load_image(data=iter(pipe))
            _drain(events, lambda: _later(loop, on_event))

        with_errors = self._translated(send, "load the image")
        await stream_through(produce, with_errors, name="engine-load")

    def pull(
        self,
        reference: str,
        platform: Platform,
        login: RegistryLogin,
        on_event: Callable[[], None],
    ) -> asyncio.Future[None]:
        """Make the engine pull `HOST:PORT/NAME@sha256:...`.

        Returns:
            The pull. It cannot be cancelled, only starved: it fails when the registry that it
            reads from closes. It fails with `EngineError`.
        """
        loop = asyncio.get_running_loop()
        auth = {"username": login.username, "password": login.password}

        def receive(_: None) -> None:
            events = self._streams.pull(
                reference, stream=True, decode=True, auth_config=auth, platform=str(platform)
            )
            _drain(events, lambda: _later(loop, on_event))

        translated = self._translated(receive, "pull the image")
        return in_thread(lambda: translated(None), name="engine-pull")

    async def _call(self, function: Callable[[], T], doing: str) -> T:
        translated = self._translated(lambda _: function(), doing)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await in_thread(lambda: translated(None), name="engine-call")
        except TimeoutError:
            raise EngineError(
                f"no answer for {CALL_SECONDS:.0f} seconds when asked to {doing}", "lost"
            ) from None

    def _translated(self, function: Callable[[Any], T], doing: str) -> Callable[[Any], T]:
        return lambda argument: translate(lambda: function(argument), doing)


def _drain(events: Iterable[Any], on_event: Callable[[], None]) -> None:
    """Read an engine's stream of messages to its end, so that its connection is free again.

    Raises:
        EngineError: a message was an error.
    """
    failure = ""
    for event in events:
        if isinstance(event, dict):
            detail = event.get("errorDetail")
            words = detail.get("message") if isinstance(detail, dict) else None
            failure = failure or str(event.get("error") or words or "")
            on_event()
    if failure:
        raise EngineError(failure, "refused")


def _later(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def _platform_json(platform: Platform) -> str:
    fields = {"os": platform.os, "architecture": platform.architecture}
    if platform.variant:
        fields["variant"] = platform.variant
    return json.dumps(fields)
