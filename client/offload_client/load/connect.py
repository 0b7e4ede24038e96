"""Find the user's engine and learn what it is."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from offload_client.bytepipe import in_thread
from offload_client.load.endpoint import Endpoint, resolve_endpoint
from offload_client.load.engine import CALL_SECONDS, Engine, EngineInfo
from offload_client.load.engineerror import explain
from offload_client.load.platform import Platform
from offload_core.errors import ImageLoadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from docker import APIClient

_FIRST_VERSION = "1.41"

_SILENCE_SECONDS = 900.0
"""The engine may unpack one large layer without a word on a slow disk."""


@asynccontextmanager
async def open_engine(environment: Mapping[str, str]) -> AsyncIterator[Engine]:
    """Connect to the user's engine.

    Raises:
        ImageLoadError: there is no engine, or the docker SDK is not installed.
        ConfigError: the docker context cannot be read.
    """
    endpoint = resolve_endpoint(environment)
    try:
        async with asyncio.timeout(CALL_SECONDS):
            engine = await in_thread(lambda: _connect(endpoint), name="engine-connect")
    except TimeoutError:
        raise _unreachable(endpoint, f"no answer in {CALL_SECONDS:.0f} seconds") from None
    try:
        yield engine
    finally:
        engine.close()


def _connect(endpoint: Endpoint) -> Engine:
    try:
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
        # Any version will do for the question after the engine's own.
        asking = _client(endpoint, _FIRST_VERSION, CALL_SECONDS)
        clients.append(asking)
        version = str(asking.version(api_version=False)["ApiVersion"])
        asking.close()
        calls = _client(endpoint, version, CALL_SECONDS)
        clients.append(calls)
        streams = _client(endpoint, version, _SILENCE_SECONDS)
        clients.append(streams)
        return Engine(endpoint, calls, streams, _read_info(calls))
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        for client in clients:
            client.close()
        raise _unreachable(endpoint, explain(error)) from error


def _client(endpoint: Endpoint, version: str, timeout_seconds: float) -> APIClient:
    import docker

    client = docker.APIClient(
        base_url=endpoint.host, tls=_tls(endpoint), timeout=int(timeout_seconds), version=version
    )
    # Otherwise a REQUESTS_CA_BUNDLE of this process would win over the engine's own CA. It also
    # has to be off before the first request, which the SDK would make for version="auto".
    client.trust_env = False
    return client


def _knock(endpoint: Endpoint) -> None:
    """Try a unix socket first: the SDK leaves the socket open when it cannot connect."""
    if endpoint.host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knock:
            knock.settimeout(CALL_SECONDS)
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
        hint="is docker running, and may you use it? Without an engine, write the image to a file "
        "with -o type=docker,dest=FILE",
    )
