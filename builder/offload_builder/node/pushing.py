"""Pushing the image of a build that has ended from the node to registries."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.endedbuilds import EndedBuild
from offload_cache.manifests import MAX_MANIFEST_BYTES
from offload_cache.mirror.connection import Connection, new_session
from offload_cache.mirror.errors import DeniedError, RefusedError, UpstreamError
from offload_cache.mirror.logins import IDENTITY_USER, Login
from offload_cache.mirror.pushing import RepositoryPush
from offload_cache.mirror.upstream import origin_address
from offload_core.aio import for_each
from offload_core.errors import (
    AccessDeniedError,
    BuildFailedError,
    NotFoundError,
    QuotaExceededError,
    RegistryAuthError,
    UsageError,
)
from offload_proto.v1.node_service_pb2 import PushImageResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from offload_builder.node.imagefiles import ImageFiles
    from offload_builder.node.job import BuildJob
    from offload_builder.node.registryaccess import RegistryAccess
    from offload_builder.node.savedimages import SavedImage
    from offload_proto.v1.node_service_pb2 import PushImageRequest, RegistryLogin

log = structlog.get_logger(__name__)

MAX_NAMES = 32
MAX_PUSHES = 4
"""Images on their way at a time, for all clients of the node."""
PARALLEL_BLOBS = 3
_NAME = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9a-fA-F:]+\](?::\d{1,5})?)"
    r"/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*):(?P<tag>\w[\w.-]{0,127})",
    re.ASCII,
)
_slots = asyncio.Semaphore(MAX_PUSHES)


async def push_image(
    build: BuildJob | EndedBuild | SavedImage,
    request: PushImageRequest,
    access: RegistryAccess,
) -> PushImageResponse:
    """Push an image under each of the names that are asked for.

    Args:
        build: that made it.
        request: names and logins.
        access: the way to registries.

    Raises:
        NotFoundError: the build has made no image, or a part of it is nowhere any more.
        UsageError: it has not ended, or a name cannot be understood.
        AccessDeniedError: a policy refuses the registry, or where it leads.
        RegistryAuthError: a registry refuses the login.
        BuildFailedError: a registry does not take it.
    """
    result = build.result
    if result is None:
        raise UsageError(f"the build {build.build_id} has not ended yet; push its image afterwards")
    digest = result.success.image.digest
    if not digest:
        raise NotFoundError(
            f"the build {build.build_id} has made no image; build with --save or --load"
        )
    targets = parse_names(request.names)
    if _slots.locked():
        raise QuotaExceededError("the node pushes other images just now; try again in a moment")
    sent = 0
    async with _slots, new_session(access.judge) as session, _kept(build):
        if isinstance(build, EndedBuild):
            await build.know_image()
        before: dict[str, str] = {}
        for host, repository, tag in targets:
            address = origin_address(host)
            push = RepositoryPush(
                Connection(access.endpoint(host, repository), session),
                repository,
                given_login(request.logins, host),
            )
            name = f"{host}/{repository}:{tag}"
            with push_errors(host, name):
                sent += await _push(push, build.image, digest, tag, before.get(address, ""))
            before[address] = repository
            log.info("image.pushed", build_id=build.build_id, name=name, sent_bytes=sent)
    return PushImageResponse(digest=digest, sent_bytes=sent)


def parse_names(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return registry, repository and tag of each name of a push.

    Raises:
        UsageError: there are too few or too many, or one cannot be understood.
    """
    targets = [parse_name(name) for name in names]
    if not 0 < len(targets) <= MAX_NAMES:
        raise UsageError(f"an image is pushed under 1 to {MAX_NAMES} names")
    return targets


@contextmanager
def push_errors(host: str, name: str) -> Iterator[None]:
    """Say of a push that fails what was pushed, and what to do.

    Args:
        host: of the registry.
        name: of the image, with its host.

    Raises:
        AccessDeniedError: a policy refuses the registry, or where it leads.
        RegistryAuthError: the registry does not take it from this login.
        BuildFailedError: anything else of the registry.
    """
    try:
        yield
    except DeniedError as error:
        raise RegistryAuthError(
            f"the registry refused to take {name}: {error}",
            hint=f"log in with: docker login {host}",
        ) from error
    except RefusedError as error:
        raise AccessDeniedError(f"egress: {error}; {name} was not pushed") from error
    except UpstreamError as error:
        raise BuildFailedError(f"{name} could not be pushed: {error}") from error


@asynccontextmanager
async def _kept(build: BuildJob | EndedBuild | SavedImage) -> AsyncIterator[None]:
    if not isinstance(build, EndedBuild):
        yield
        return
    build.visits += 1
    try:
        yield
    finally:
        build.visits -= 1


async def _push(
    push: RepositoryPush, image: ImageFiles, digest: str, tag: str, mount_from: str
) -> int:
    """Push what is below first, so that nobody finds an image that is not whole."""
    sent = 0

    async def blob(item: tuple[str, int]) -> None:
        nonlocal sent
        path = await image.path(item[0])
        # Others add to the sum while this one is on its way.
        count = await push.blob(item[0], item[1], path, mount_from=mount_from)
        sent += count

    blobs = {name: size for name, size in image.below(digest) if not image.media_type(name)}
    try:
        await for_each(blobs.items(), blob, parallel=PARALLEL_BLOBS)
    except ExceptionGroup as group:
        refused, other = group.split(UpstreamError)
        if refused is None or other is not None:
            raise
        raise refused.exceptions[0] from None
    for child in image.children(digest):
        sent += await _manifest(push, image, child, child)
    return sent + await _manifest(push, image, digest, tag)


async def _manifest(push: RepositoryPush, image: ImageFiles, digest: str, reference: str) -> int:
    if reference == digest and await push.has_manifest(digest):
        return 0
    body = await image.store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
    return await push.manifest(reference, body, image.media_type(digest))


def parse_name(name: str) -> tuple[str, str, str]:
    """Return registry, repository and tag of an image name.

    Raises:
        UsageError: it has not all of them.
    """
    found = _NAME.fullmatch(name)
    if found is None or len(name) > 512:
        raise UsageError(f'"{name[:200]}" is no image name with a registry and a tag')
    return found["host"], found["repository"], found["tag"]


def given_login(logins: Mapping[str, RegistryLogin], host: str) -> Login | None:
    """Return the login for a registry that came with a request; None without one."""
    for key in (host, origin_address(host)):
        if key in logins:
            given = logins[key]
            return Login(given.username or IDENTITY_USER, given.secret)
    return None
