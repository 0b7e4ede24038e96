"""What a node has for engines of sessions: images of builds, base images, tokens of the pool."""

from __future__ import annotations

import base64
import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.urls.locations import OddSourceError, image_at
from offload_builder.node.imagefiles import ImageFiles
from offload_builder.node.sessions.guard.images import Source
from offload_builder.node.trustdomain import TrustDomain
from offload_cache.contributions import Writer
from offload_cache.mirror.challenges import parse_challenges
from offload_cache.mirror.connection import new_session
from offload_cache.mirror.errors import UpstreamError
from offload_cache.mirror.handlers import host_in_name
from offload_cache.mirror.tokens import TokenWish, fetch_token
from offload_cache.mirror.upstream import origin_address
from offload_cache.registry.grants import IMAGE, Grant
from offload_core.errors import NotFoundError, OffloadError, RegistryAuthError
from offload_core.reference import split_reference

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_builder.node.endedbuilds import EndedBuilds
    from offload_builder.node.isolation import Isolation
    from offload_builder.node.registries import Registries
    from offload_builder.node.sessions.contract import SessionPlace
    from offload_builder.node.slots import Slots
    from offload_cache.mirror.connection import Connection
    from offload_cache.mirror.handlers import Mirrors
    from offload_cache.nodestore import NodeStore
    from offload_cache.registry.grants import Registry

_TAG = "image"


class NodeImages:
    """Images and tokens for engines (`guard.images.ImageSources`).

    Args:
        store: of all projects.
        registry: capabilities of the node's registry.
        slots: the builds that are here.
        ended: the builds that have ended.
        registries: of the node's configuration.
        mirrors: the node's base images.
        isolation: says what policies allow.
    """

    def __init__(
        self,
        store: NodeStore,
        registry: Registry,
        slots: Slots,
        ended: EndedBuilds,
        registries: Registries,
        mirrors: Mirrors,
        isolation: Isolation,
    ) -> None:
        self._store = store
        self._registry = registry
        self._slots = slots
        self._ended = ended
        self._registries = registries
        self._mirrors = mirrors
        self._isolation = isolation

    def built(self, place: SessionPlace, name: str) -> str:
        """Return the digest of the newest image that the member has built under a name, or ""."""
        for build in reversed(self._slots.builds.values()):
            job = build.job
            if (
                job is not None
                and job.result is not None
                and job.image_digest
                and (job.project_id, job.member) == (place.project_id, place.owner)
                and name in job.image_names
            ):
                return job.image_digest
        return self._ended.newest_image(place.project_id, place.owner, name)

    @asynccontextmanager
    async def source(
        self, place: SessionPlace, registry: str, name: str
    ) -> AsyncIterator[Source | None]:
        """Give an engine a way to an image while the context is open; None where there is none.

        Args:
            place: whose session.
            registry: HOST:PORT of the node's registry, as the engine reaches it.
            name: of the image, normalised.
        """
        async with AsyncExitStack() as stack:
            found = None
            if digest := self.built(place, name):
                found = await self._grant(stack, place, registry, digest)
            yield found or await self._mirrored(stack, place, registry, name)

    async def _grant(
        self, stack: AsyncExitStack, place: SessionPlace, registry: str, digest: str
    ) -> Source | None:
        cache = await self._store.project(place.project_id)
        image = ImageFiles(cache.store)
        try:
            await image.admit(digest)
        except NotFoundError:
            # Neither the disk nor the shared store has kept it.
            return None
        writer = Writer(place.session_id, place.owner, place.role)
        # The member can read it in the engine's memory, and hold the pull for as long as it wants.
        grant = Grant(cache, (), None, "", writer, may_import=False, may_push=False)
        capability = self._registry.grant(grant)
        stack.push_async_callback(self._registry.revoke, capability)
        state = self._registry.state(capability)
        state.image.tags[_TAG] = digest
        for blob in image.sizes:
            state.lease(blob)
        state.keep_shared(image.sizes)
        return Source(f"{registry}/{capability}/{IMAGE}", _TAG, digest)

    async def _mirrored(
        self, stack: AsyncExitStack, place: SessionPlace, registry: str, name: str
    ) -> Source | None:
        """Return the way to an image of a registry of the configuration, through the node.

        All projects may reach these. Of others the engine asks the registry itself, through its own
        network.
        """
        host, path, tag = split_reference(name)
        if host not in self._registries.settings:
            return None
        cache = await self._store.project(place.project_id)
        project = place.project_id
        bases = await stack.enter_async_context(
            self._registries.serve(
                self._mirrors,
                registry,
                cache.store,
                trusted=_is_trusted(place),
                elsewhere=lambda host: self._connected(project, host),
                judge=self._isolation.judge(project),
            )
        )
        mirrors = bases.registries[host].mirrors if host in bases.registries else ()
        own = next((mirror for mirror in mirrors if mirror.startswith(f"{registry}/")), "")
        return Source(f"{own.removesuffix(host)}{host_in_name(host)}/{path}", tag) if own else None

    def _connected(self, project_id: str, host: str) -> bool:
        try:
            server = image_at(host, "image").host
        except OddSourceError:
            return False
        return bool(Evaluator(self._isolation.policy_of(project_id)).connected(server))

    async def login(self, place: SessionPlace, name: str, *, push: bool) -> str:
        """Return the value of X-Registry-Auth for an image; empty for none.

        It has a token for the one repository, never a login of the pool: who owns a session can
        read the memory of its engine. So registries without tokens need a login of the member's.

        Raises:
            OffloadError: the registry does not give a token.
        """
        registry, path, _ = split_reference(name)
        host = origin_address(registry)
        judge = self._isolation.judge(place.project_id)
        async with AsyncExitStack() as stack:
            session = self._mirrors.session
            if judge is not None:
                session = await stack.enter_async_context(new_session(judge))
            trusted = _is_trusted(place)
            logins = self._registries.logins(place.project_id, session, trusted=trusted)
            scope = f"repository:{path}:{'pull,push' if push else 'pull'}"
            grant = await logins.grant(host, [scope]) if logins.has_login(host) else None
            if grant is None:
                return ""
            if judge is not None:
                judge.check(registry, path)
            connection = logins.connection(host)
            try:
                wish = await _challenge(connection, grant.scopes)
                if wish is None:
                    return ""
                token = await fetch_token(connection, wish, grant.login)
            except UpstreamError as error:
                raise RegistryAuthError(f"{registry} gives no token for {path}: {error}") from error
        answer = {"registrytoken": token.text, "serveraddress": registry}
        return base64.urlsafe_b64encode(json.dumps(answer).encode()).decode()


async def _challenge(connection: Connection, scopes: tuple[str, ...]) -> TokenWish | None:
    """Ask a registry where its tokens come from; None when it has none."""
    answer = await connection.open("GET", f"{connection.endpoint.base_url}/", {})
    try:
        headers = answer.headers.getall("WWW-Authenticate", [])
    finally:
        answer.release()
    for challenge in parse_challenges(list(headers)):
        if challenge.scheme == "bearer" and (realm := challenge.parameters.get("realm")):
            return TokenWish(realm, challenge.parameters.get("service", ""), scopes)
    return None


def _is_trusted(place: SessionPlace) -> bool:
    try:
        return not TrustDomain(place.project_id, place.trust_domain).is_untrusted
    except OffloadError:
        return False
