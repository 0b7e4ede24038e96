"""The user's container engine, spoken to through the docker SDK for Python.

The SDK blocks and takes about 150 ms to import, so it is imported on first use and every call runs
in a thread of its own with a limit.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from offload_core.errors import ImageLoadError

from offload_client.bytepipe import in_thread, stream_through
from offload_client.load.endpoint import Endpoint, resolve_endpoint
from offload_client.load.platform import Platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

    from docker import APIClient

    from offload_client.bytepipe import BytePipe
    from offload_client.load.names import ImageName

T = TypeVar("T")

_CALL_SECONDS = 60.0
_SILENCE_SECONDS = 900
"""The engine may unpack one large layer without a word on a slow disk."""

_ZSTD_API = (1, 45)
"""API of engine 26, the first on which zstd layers in archives were tried with success."""

_PLATFORM_INSPECT_API = (1, 49)
"""API of engine 28.2, the first whose image inspect takes a platform."""


class EngineError(Exception):
    """The engine refused or vanished; becomes an `ImageLoadError` in the loader.

    `kind` says which of the two: "refused" has the engine's own words, "lost" has no answer.
    """

    def __init__(self, message: str, kind: Literal["refused", "missing", "lost"]) -> None:
        super().__init__(message)
        self.kind = kind


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
                timeout=_CALL_SECONDS,
            )
            if response.status_code == 404:
                return None
            response.raise_for_status()
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

    async def pull(
        self,
        reference: str,
        platform: Platform,
        login: RegistryLogin,
        on_event: Callable[[], None],
    ) -> None:
        """Make the engine pull `HOST:PORT/NAME@sha256:...`.

        On cancellation the thread is left to itself: it ends when the registry that it reads from
        closes.

        Raises:
            EngineError: the engine could not pull, or vanished.
        """
        loop = asyncio.get_running_loop()
        auth = {"username": login.username, "password": login.password}

        def receive() -> None:
            events = self._streams.pull(
                reference, stream=True, decode=True, auth_config=auth, platform=str(platform)
            )
            _drain(events, lambda: _later(loop, on_event))

        translated = self._translated(lambda _: receive(), "pull the image")
        await in_thread(lambda: translated(None), name="engine-pull")

    async def _call(self, function: Callable[[], T], doing: str) -> T:
        translated = self._translated(lambda _: function(), doing)
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await in_thread(lambda: translated(None), name="engine-call")
        except TimeoutError:
            raise EngineError(
                f"no answer for {_CALL_SECONDS:.0f} seconds when asked to {doing}", "lost"
            ) from None

    def _translated(self, function: Callable[[Any], T], doing: str) -> Callable[[Any], T]:
        return lambda argument: _translate(lambda: function(argument), doing)


@asynccontextmanager
async def open_engine(environment: Mapping[str, str]) -> AsyncIterator[Engine]:
    """Connect to the user's engine.

    Raises:
        ImageLoadError: there is no engine, or the docker SDK is not installed.
        ConfigError: the docker context cannot be read.
    """
    endpoint = resolve_endpoint(environment)
    try:
        async with asyncio.timeout(_CALL_SECONDS):
            engine = await in_thread(lambda: _connect(endpoint), name="engine-connect")
    except TimeoutError:
        raise _unreachable(endpoint, f"no answer in {_CALL_SECONDS:.0f} seconds") from None
    try:
        yield engine
    finally:
        engine._calls.close()
        engine._streams.close()


def _connect(endpoint: Endpoint) -> Engine:
    try:
        import docker
        import docker.errors
        import requests.exceptions
    except ImportError as error:
        raise ImageLoadError(
            "loading an image needs the docker SDK for Python",
            hint='install it with: pip install "offload-build[load]"',
        ) from error
    clients: list[APIClient] = []
    try:
        _knock(endpoint)
        tls = _tls(endpoint)
        calls = docker.APIClient(
            base_url=endpoint.host, tls=tls, timeout=int(_CALL_SECONDS), version="auto"
        )
        clients.append(calls)
        streams = docker.APIClient(
            base_url=endpoint.host, tls=tls, timeout=_SILENCE_SECONDS, version=calls.api_version
        )
        clients.append(streams)
        return Engine(endpoint, calls, streams, _read_info(calls))
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        OSError,
        ValueError,
    ) as error:
        for client in clients:
            client.close()
        raise _unreachable(endpoint, _reason(error)) from error


def _knock(endpoint: Endpoint) -> None:
    """Try a unix socket first: the SDK leaves the socket open when it cannot connect."""
    if endpoint.host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knock:
            knock.settimeout(_CALL_SECONDS)
            knock.connect(endpoint.host.removeprefix("unix://"))


def _tls(endpoint: Endpoint) -> Any:
    if endpoint.tls is None:
        return False
    import docker.tls

    directory = endpoint.tls.directory
    return docker.tls.TLSConfig(
        client_cert=(str(directory / "cert.pem"), str(directory / "key.pem")),
        ca_cert=str(directory / "ca.pem"),
        verify=endpoint.tls.verify,
    )


def _read_info(client: APIClient) -> EngineInfo:
    info = client.info()
    status = {str(row[0]): str(row[1]) for row in info.get("DriverStatus") or [] if len(row) == 2}
    major, _, minor = str(client.api_version).partition(".")
    return EngineInfo(
        engine_id=str(info.get("ID") or ""),
        version=str(info.get("ServerVersion") or ""),
        api_version=(int(major), int(minor)),
        # "driver-type" of an engine whose images live in containerd's content store.
        containerd_store=status.get("driver-type") == "io.containerd.snapshotter.v1",
        platform=Platform.of(
            str(info.get("OSType") or "linux"), str(info.get("Architecture") or "amd64")
        ),
    )


def _unreachable(endpoint: Endpoint, reason: str) -> ImageLoadError:
    return ImageLoadError(
        f"no container engine answers at {endpoint}: {reason}",
        hint="is docker running? Without an engine, write the image to a file with "
        "-o type=docker,dest=FILE",
    )


def _translate(function: Callable[[], T], doing: str) -> T:
    """Run a blocking SDK call; map what it raises."""
    import docker.errors
    import requests.exceptions
    import urllib3.exceptions

    try:
        return function()
    except docker.errors.NotFound as error:
        raise EngineError(_reason(error), "missing") from error
    except docker.errors.DockerException as error:
        raise EngineError(_reason(error), "refused") from error
    except (
        requests.exceptions.RequestException,
        # The SDK reads streamed answers below requests.
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise EngineError(f"the connection broke when asked to {doing}", "lost") from error


def _drain(events: Iterable[Any], on_event: Callable[[], None]) -> None:
    """Read an engine's stream of messages to its end.

    Raises:
        EngineError: a message is an error.
    """
    for event in events:
        if not isinstance(event, dict):
            continue
        detail = event.get("errorDetail")
        message = event.get("error") or (detail.get("message") if isinstance(detail, dict) else "")
        if message:
            raise EngineError(str(message), "refused")
        on_event()


def _later(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def _reason(error: Exception) -> str:
    """Return the innermost words of an error of the SDK, without its layers of wrapping."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation)
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause)


def _platform_json(platform: Platform) -> str:
    fields = {"os": platform.os, "architecture": platform.architecture}
    if platform.variant:
        fields["variant"] = platform.variant
    return json.dumps(fields)
