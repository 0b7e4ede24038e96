"""What a repository has, over HTTP: tags and referrers.

Source: OCI distribution specification 1.1, "Listing Tags", "Listing Referrers".
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from aiohttp import web

from offload_cache.manifests import OCI_INDEX
from offload_cache.registry.grants import CACHE
from offload_cache.registry.links import empty_index
from offload_cache.registry.responses import RegistryError, digest_of

if TYPE_CHECKING:
    from offload_cache.registry.grants import Registry

_PAGE_TAGS = 1000


class DiscoveryHandlers:
    """The endpoints `tags/list` and `referrers/<digest>` of a repository."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        return [
            web.get(f"{base}/tags/list", self.tags),
            web.get(f"{base}/referrers/{{digest}}", self.referrers),
        ]

    async def tags(self, request: web.Request) -> web.StreamResponse:
        """GET of a repository's tags, in the order of their bytes."""
        state, repository = self._registry.requested(request)
        tags = sorted(state.cache_tags if repository == CACHE else state.image.tags)
        text = request.query.get("n", str(_PAGE_TAGS))
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise RegistryError(400, "UNSUPPORTED", "n is no number of tags")
        size = min(int(text), _PAGE_TAGS)
        start = bisect.bisect_right(tags, request.query["last"]) if "last" in request.query else 0
        page = tags[start : start + size]
        headers = {}
        if page and start + size < len(tags):
            headers["Link"] = _next(request, {"n": str(size), "last": page[-1]})
        name = f"{request.match_info['capability']}/{repository}"
        return web.json_response({"name": name, "tags": page}, headers=headers)

    async def referrers(self, request: web.Request) -> web.StreamResponse:
        """GET of the manifests with a subject; a cache has none."""
        state, repository = self._registry.requested(request)
        subject = digest_of(request.match_info["digest"])
        artifact_type = request.query.get("artifactType")
        headers = {"Content-Type": OCI_INDEX}
        body, last = empty_index(), None
        if repository != CACHE:
            body, last = state.image.referrers(
                subject, artifact_type, request.query.get("last", "")
            )
        if artifact_type is not None:
            headers["OCI-Filters-Applied"] = "artifactType"
        if last is not None:
            filters = {} if artifact_type is None else {"artifactType": artifact_type}
            headers["Link"] = _next(request, filters | {"last": last})
        return web.Response(body=body, headers=headers)


def _next(request: web.Request, query: dict[str, str]) -> str:
    """Return a Link header to the next page: RFC 8288."""
    return f'<{request.path}?{urlencode(query)}>; rel="next"'
