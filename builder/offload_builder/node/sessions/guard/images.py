"""Images for a session: what its member has built here comes from the node, not over the network.

A pull of a name that the member gave to an image of a build at this node is answered by the guard:
the engine fetches the image from the node's registry, under a capability that ends with the pull,
and then calls it as it was asked for. Images of registries of the node's configuration come through
the node as well, which has the pool's logins: an engine belongs to a member, who must not read them
there. For pushes to such registries the engine gets a token for the one repository.
"""

from __future__ import annotations

import base64
import json
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlencode

import structlog

from offload_core.enginecalls import UnixConnection, call_engine, json_lines, request
from offload_core.enginehttp import ResponseReader
from offload_core.errors import InvalidValueError, NodeLostError, OffloadError
from offload_core.reference import familiar_reference, split_reference
from offload_core.sparselog import SparseLog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from offload_builder.node.sessions.contract import SessionPlace
    from offload_builder.node.sessions.guard.stream import Exchange

log = SparseLog(structlog.get_logger(__name__))

AUTH_HEADER = "X-Registry-Auth"
_CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the engine fetches an image instead.

    Attributes:
        repository: HOST:PORT/PATH at the node's registry.
        tag: there.
        digest: of the image; empty where that is not known before.
    """

    repository: str
    tag: str
    digest: str = ""


class ImageSources(Protocol):
    """What the node has for engines of sessions."""

    def built(self, place: SessionPlace, name: str) -> str:
        """Return the digest of the newest image that the member has built under a name, or ""."""

    def source(
        self, place: SessionPlace, registry: str, name: str
    ) -> AbstractAsyncContextManager[Source | None]:
        """Give an engine a way to an image while the context is open; None where there is none.

        Args:
            place: whose session.
            registry: HOST:PORT of the node's registry, as the engine reaches it.
            name: of the image, normalised.
        """

    async def login(self, place: SessionPlace, name: str, *, push: bool) -> str:
        """Return the value of X-Registry-Auth for an image; empty for none."""


class SessionImages:
    """Pulls and pushes of one session.

    Args:
        sources: of the node.
        place: whose session.
        engine: socket of the engine.
        registry: HOST:PORT of the node's registry, as the engine reaches it.
    """

    def __init__(
        self, sources: ImageSources, place: SessionPlace, engine: Path, registry: str
    ) -> None:
        self._sources = sources
        self._place = place
        self._engine = engine
        self._registry = registry
        self._brought: dict[str, tuple[str, str]] = {}
        """Digest and the engine's id of what was brought under a name."""

    async def pull(self, exchange: Exchange) -> None:
        """Handle `POST /images/create`."""
        query = exchange.head.query
        name = _wanted(query)
        if name is None:
            await exchange.pass_on()
            return
        if _has_login(exchange.head.header(AUTH_HEADER)) or not await self._bring(
            name, query.get("platform", [""])[0], exchange
        ):
            await self._with_login(exchange, name, push=False)

    async def push(self, exchange: Exchange) -> None:
        """Handle `POST /images/NAME/push`."""
        name = exchange.head.path.removeprefix("/images/").removesuffix("/push")
        tag = exchange.head.query.get("tag", [""])[0]
        try:
            registry, path, _ = split_reference(f"{name}:{tag}" if tag else name)
        except InvalidValueError:
            await exchange.pass_on()
            return
        await self._with_login(exchange, f"{registry}/{path}:{tag or 'latest'}", push=True)

    async def renew(self, image: str) -> None:
        """Bring the newest image of a name that an older one was brought under.

        What the member has given the name to in the session is left alone.
        """
        try:
            registry, path, tag = split_reference(image)
        except InvalidValueError:
            return
        name = f"{registry}/{path}:{tag}"
        before = self._brought.get(name)
        digest = self._sources.built(self._place, name)
        if before is None or not digest or before[0] == digest:
            return
        if await self._image_id(name) == before[1]:
            await self._bring(name, "", None)

    async def _with_login(self, exchange: Exchange, name: str, *, push: bool) -> None:
        login = ""
        if not _has_login(exchange.head.header(AUTH_HEADER)):
            try:
                login = await self._sources.login(self._place, name, push=push)
            except OffloadError as error:
                # The registry says what it thinks of somebody without a login.
                log.info("session.login.failed", image=name, cause=error.message)
        head = exchange.head.replaced(headers={AUTH_HEADER: login}) if login else None
        await exchange.pass_on(head)

    async def _bring(self, name: str, platform: str, exchange: Exchange | None) -> bool:
        """Bring an image from the node; False when it has none, or could not give it."""
        progress: _Progress | None = None
        async with AsyncExitStack() as stack:
            try:
                source = await stack.enter_async_context(
                    self._sources.source(self._place, self._registry, name)
                )
                if source is None:
                    return False
                progress = _Progress(exchange, source, name)
                await self._fetch(source, platform, progress)
                await self._rename(source, name)
            except OffloadError as error:
                log.warning(
                    "session.image.not_brought",
                    session_id=self._place.session_id,
                    image=name,
                    cause=error.message,
                )
                if progress is None or not progress.begun:
                    return False
                await progress.fail(error.message)
                return True
        if source.digest:
            self._brought[name] = source.digest, await self._image_id(name)
        await progress.end()
        log.info("session.image.brought", session_id=self._place.session_id, image=name)
        return True

    async def _fetch(self, source: Source, platform: str, progress: _Progress) -> None:
        query = {"fromImage": source.repository, "tag": source.tag}
        if platform:
            query["platform"] = platform
        async with aclosing(self._lines(f"/images/create?{urlencode(query)}")) as lines:
            async for line in lines:
                if isinstance(line, dict) and line.get("error"):
                    raise NodeLostError(str(line["error"]))
                await progress.tell(line)

    async def _lines(self, target: str) -> AsyncGenerator[Any]:
        connection = await UnixConnection.open(self._engine)
        try:
            await connection.send(request("POST", target))
            reader = ResponseReader(connection.receive)
            head = await reader.head("POST")
            if head.status != 200:
                told = await reader.read_body(1 << 20)
                raise NodeLostError(f"the engine answers {head.status}: {told[:300]!r}")
            async with aclosing(reader.content()) as pieces:
                async for line in json_lines(pieces):
                    yield line
        finally:
            await connection.aclose()

    async def _rename(self, source: Source, name: str) -> None:
        repository, _, tag = name.rpartition(":")
        inside = quote(f"{source.repository}:{source.tag}", safe="/:")
        wanted = urlencode({"repo": repository, "tag": tag})
        done = await self._call("POST", f"/images/{inside}/tag?{wanted}")
        if done.status != 201:
            raise NodeLostError(f"the engine does not name the image: {done.message}")
        # Its way through the node is nobody's business any more.
        await self._call("DELETE", f"/images/{inside}?noprune=1")

    async def _image_id(self, name: str) -> str:
        reply = await self._call("GET", f"/images/{quote(name, safe='/:')}/json")
        return str(reply.json().get("Id", "")) if reply.status == 200 else ""

    async def _call(self, method: str, target: str) -> Any:
        return await call_engine(lambda: UnixConnection.open(self._engine), method, target)


class _Progress:
    """Docker's lines about a pull, with the name that was asked for."""

    def __init__(self, exchange: Exchange | None, source: Source, name: str) -> None:
        self._exchange = exchange
        self._names = {
            f"{source.repository}:{source.tag}": familiar_reference(name),
            source.repository: familiar_reference(name).rpartition(":")[0],
            # Docker calls it by its path.
            source.repository.partition("/")[2]: name.partition("/")[2].rpartition(":")[0],
        }
        self._tags = source.tag, name.rpartition(":")[2]
        self._name = familiar_reference(name)
        self._last: Any = None
        self.begun = False

    async def tell(self, line: Any) -> None:
        """Pass a line on."""
        if not isinstance(line, dict):
            return
        status = str(line.get("status", ""))
        for inside, name in self._names.items():
            status = status.replace(inside, name)
        if "status" in line:
            line["status"] = status
        if line.get("id") == self._tags[0]:
            line["id"] = self._tags[1]
        if status.startswith("Status: "):
            # The last word, once the image has its name.
            self._last = line
            return
        await self._say(line)

    async def end(self) -> None:
        """Say the last word."""
        await self._say(self._last or {"status": f"Status: Image is up to date for {self._name}"})
        await self._finish()

    async def fail(self, cause: str) -> None:
        """Say that it went wrong after it had begun."""
        await self._say({"error": cause, "errorDetail": {"message": cause}})
        await self._finish()

    async def _say(self, line: Any) -> None:
        if self._exchange is None:
            return
        if not self.begun:
            self.begun = True
            await self._exchange.answer(_CHUNKED)
        data = json.dumps(line).encode() + b"\r\n"
        await self._exchange.answer(b"%x\r\n%b\r\n" % (len(data), data))

    async def _finish(self) -> None:
        if self._exchange is not None:
            await self._exchange.answer(b"0\r\n\r\n")


def _wanted(query: dict[str, list[str]]) -> str | None:
    """Return the normalised name of an image that is to be pulled; None for anything else."""
    image, tag = query.get("fromImage", [""])[0], query.get("tag", [""])[0]
    last = image.rpartition("/")[2]
    if not image or "@" in image or ":" in tag or not (tag or ":" in last):
        return None
    try:
        registry, path, named = split_reference(f"{image}:{tag}" if tag else image)
    except InvalidValueError:
        return None
    return f"{registry}/{path}:{named}"


def _has_login(header: str) -> bool:
    """Return whether the client has sent a login; an empty one says who is at fault."""
    if not header:
        return False
    try:
        found = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except ValueError:
        return True
    keys = ("username", "auth", "identitytoken", "registrytoken")
    return not isinstance(found, dict) or any(found.get(key) for key in keys)
