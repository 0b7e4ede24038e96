"""Base images over HTTP, for the BuildKits of this node.

    /v2/<secret of a project>/base/<host>/<name>/manifests/<tag or digest>
    /v2/<secret of a project>/base/<host>/<name>/blobs/<digest>

Source: OCI distribution specification 1.1, "Pulling manifests", "Pulling blobs"; BuildKit's
util/resolver/resolver.go for what a mirror's path is. Everything that is not served is a 404:
BuildKit then asks the image's own registry, with the login of the person who builds.
"""

from __future__ import annotations

import re
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Self

import structlog
from aiohttp import web

from offload_cache.mirror.connection import new_session
from offload_cache.mirror.errors import UpstreamError
from offload_cache.mirror.images import BaseImages
from offload_cache.mirror.upstream import Upstream
from offload_cache.registry.responses import (
    UNKNOWN_NAME,
    RegistryError,
    unknown_blob,
    unknown_manifest,
)
from offload_cache.registry.sending import send_blob
from offload_core.digest import is_digest
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    import aiohttp

    from offload_cache.database import CacheDatabase
    from offload_cache.mirror.images import BasePolicy
    from offload_cache.mirror.upstream import RegistrySource
    from offload_cache.tiered import ProjectStore

_log = structlog.get_logger(__name__)

_SECRET_BYTES = 24
_PORT_MARK = "__"
"""In place of the colon before a port: docker engines take none within a name."""
_PATH = "/v2/{secret:[a-f0-9]{48}}/base/{host}/{name:.+}"
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MAX_NAME = 255


def host_in_name(host: str) -> str:
    """Return what stands for a host in the names of images that docker engines are given."""
    return host.replace(":", _PORT_MARK)


class Mirrors:
    """The base images of a node's projects; an async context manager.

    Args:
        sources: the registries whose images are cached, with the logins of a project.
        database: the node's index.
        policy: when upstream registries are asked.

    Raises:
        ConfigError: a certificate file cannot be read.
    """

    def __init__(
        self,
        sources: Callable[[str], Sequence[RegistrySource]],
        database: CacheDatabase,
        policy: BasePolicy,
    ) -> None:
        self._sources = sources
        self._database = database
        self._policy = policy
        self._session: aiohttp.ClientSession
        self._images: dict[str, tuple[BaseImages, Callable[[str], bool]]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._session = await stack.enter_async_context(new_session())
            # Certificates that cannot be read are told when the node starts.
            for source in self._sources(""):
                Upstream(source, self._session)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    @property
    def session(self) -> aiohttp.ClientSession:
        """For HTTP to registries, while this is open."""
        return self._session

    def hosts(self, project_id: str) -> list[str]:
        """Return the hosts whose images are cached."""
        return [source.host for source in self._sources(project_id)]

    @asynccontextmanager
    async def serve(
        self,
        store: ProjectStore,
        hosts: Collection[str],
        elsewhere: Callable[[str], bool] = lambda _: False,
    ) -> AsyncIterator[tuple[str, BaseImages]]:
        """Serve images of some hosts to a project while the context is open.

        Args:
            store: of the project.
            hosts: whose images are served.
            elsewhere: says of a host, at every request, whether the node cannot reach it as the
                project's BuildKit does; its images are then left to that one.

        Yields:
            The secret path, to which a host is added, and the project's base images.
        """
        secret = secrets.token_hex(_SECRET_BYTES)
        upstreams = {
            source.host: Upstream(source, self._session)
            for source in self._sources(store.project_id)
            if source.host in hosts
        }
        async with BaseImages(store, self._database, upstreams, self._policy) as images:
            self._images[secret] = images, elsewhere
            try:
                yield f"{secret}/base", images
            finally:
                del self._images[secret]

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for the node's registry."""
        return [
            web.get(f"{_PATH}/manifests/{{reference}}", self._manifest, allow_head=True),
            web.get(f"{_PATH}/blobs/{{digest}}", self._blob, allow_head=True),
        ]

    def _asked(self, request: web.Request) -> tuple[BaseImages, str, str]:
        info = request.match_info
        host = info["host"].replace(_PORT_MARK, ":")
        # A dict look-up of a 192-bit secret: its timing tells nothing useful.
        images, elsewhere = self._images.get(info["secret"], (None, None))
        name = info["name"]
        if elsewhere is not None and elsewhere(host):
            raise RegistryError(*UNKNOWN_NAME)
        if images is None or len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
            raise RegistryError(*UNKNOWN_NAME)
        return images, host, name

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        images, host, name = self._asked(request)
        reference = request.match_info["reference"]
        if not is_digest(reference) and _TAG.fullmatch(reference) is None:
            raise unknown_manifest()
        # BuildKit asks with HEAD what a name means, and with GET for what it has found.
        named = request.method == "HEAD" or not is_digest(reference)
        try:
            if named:
                manifest = await images.resolve(host, name, reference)
            else:
                manifest = await images.manifest(host, name, reference)
        except UpstreamError as error:
            raise unknown_manifest() from error
        except OffloadError as error:
            _log.warning("base_images.failed", repository=f"{host}/{name}", cause=error.message)
            raise unknown_manifest() from error
        if request.method == "GET":
            images.store.statistics.bytes_served += len(manifest.body)
        return web.Response(
            body=manifest.body,
            headers={
                "Content-Type": manifest.media_type,
                "Docker-Content-Digest": manifest.digest,
            },
        )

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        images, host, name = self._asked(request)
        digest = request.match_info["digest"]
        if not is_digest(digest):
            raise unknown_blob()
        try:
            if request.method == "HEAD":
                size_bytes = await images.blob_size(host, name, digest)
                return web.Response(
                    headers={
                        "Content-Length": str(size_bytes),
                        "Content-Type": "application/octet-stream",
                        "Docker-Content-Digest": digest,
                        "Accept-Ranges": "bytes",
                    }
                )
            path = await images.blob(host, name, digest)
        except UpstreamError as error:
            raise unknown_blob() from error
        except OffloadError as error:
            _log.warning("base_images.failed", repository=f"{host}/{name}", cause=error.message)
            raise unknown_blob() from error
        with images.store.lease([digest]):
            try:
                return await send_blob(request, path, digest, images.store.statistics)
            except FileNotFoundError as error:
                raise unknown_blob() from error
