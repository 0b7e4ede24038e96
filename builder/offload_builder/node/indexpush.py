"""One index over the images that several nodes have pushed, each for its own platforms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.endedbuilds import EndedBuild
from offload_builder.node.pushing import given_login, parse_names, push_errors
from offload_cache.mirror.connection import Connection, new_session
from offload_cache.mirror.errors import AwayError
from offload_cache.mirror.pushing import RepositoryPush
from offload_core.digest import is_digest
from offload_core.errors import UsageError
from offload_core.imageindex import MAX_INDEX_BYTES, JoinedIndex, join_indexes
from offload_proto.v1.node_service_pb2 import PushIndexResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from offload_builder.node.job import BuildJob
    from offload_builder.node.registryaccess import RegistryAccess
    from offload_cache.mirror.connection import Endpoint
    from offload_cache.mirror.logins import Login
    from offload_proto.v1.node_service_pb2 import PushIndexRequest

log = structlog.get_logger(__name__)

MAX_PARTS = 32


async def push_index(
    build: BuildJob | EndedBuild,
    request: PushIndexRequest,
    access: RegistryAccess,
) -> PushIndexResponse:
    """Join indexes that a registry has, and push the result under each of the names.

    Args:
        build: one of those that pushed the parts.
        request: names, logins and parts.
        access: the way to registries.

    Raises:
        UsageError: a name or digest cannot be understood.
        AccessDeniedError: a policy refuses a registry, or where it leads.
        RegistryAuthError: a registry refuses the login.
        BuildFailedError: a registry lacks a part, or does not take the index.
    """
    targets = parse_names(request.names)
    if not 0 < len(request.parts) <= MAX_PARTS or not all(map(is_digest, request.parts)):
        raise UsageError(f"an index is joined from 1 to {MAX_PARTS} digests")
    index: JoinedIndex | None = None
    async with new_session(access.judge) as session:
        for host, repository, tag in targets:
            login = given_login(request.logins, host)
            if login is None and not request.insecure:
                # The pool's password goes only where its administrator says that it may.
                login = await _of_pool(build, host, repository)
            name = f"{host}/{repository}:{tag}"
            with push_errors(host, name):
                push = await _open(
                    access.endpoint(host, repository), session, repository, login, request.parts[0],
                    insecure=request.insecure,
                )  # fmt: skip
                index = index or await _join(push, request.parts, request.platforms)
                await push.manifest(tag, index.raw, index.media_type)
            log.info("index.pushed", build_id=build.build_id, name=name, digest=index.digest)
    if index is None:
        raise UsageError("an index without a name cannot be pushed")
    return PushIndexResponse(
        digest=index.digest, media_type=index.media_type, size_bytes=len(index.raw)
    )


async def _open(
    endpoint: Endpoint,
    session: aiohttp.ClientSession,
    repository: str,
    login: Login | None,
    part: str,
    *,
    insecure: bool,
) -> RepositoryPush:
    """Return the way to a repository, in the same order in which BuildKit tries an insecure one."""
    if not insecure:
        return RepositoryPush(Connection(endpoint, session), repository, login)
    push = RepositoryPush(Connection(replace(endpoint, insecure=True), session), repository, login)
    try:
        await push.has_manifest(part)
    except AwayError:
        return RepositoryPush(Connection(replace(endpoint, http=True), session), repository, login)
    return push


async def _join(
    push: RepositoryPush, parts: Sequence[str], platforms: Sequence[str]
) -> JoinedIndex:
    return join_indexes(
        [await push.read_manifest(digest, MAX_INDEX_BYTES) for digest in parts], list(platforms)
    )


async def _of_pool(build: BuildJob | EndedBuild, host: str, repository: str) -> Login | None:
    """Return the pool's login where it may be used to push this."""
    if isinstance(build, EndedBuild) or build.pool_logins is None:
        return None
    scope = f"repository:{repository}:pull,push"
    granted = await build.pool_logins.grant(host, [scope])
    return granted.login if granted is not None and scope in granted.scopes else None
