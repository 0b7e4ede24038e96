"""The requests of docker clients that concern this machine: its ports and its directories.

Only here is it decided what of this machine a container gets; a node is never asked. Whoever asks
for something else than a container with ports or directories pays nothing for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

from offload_client.sessions.bindsources import take_sources
from offload_client.sessions.containers import KnownContainer
from offload_client.sessions.portspecs import from_engine, plan
from offload_core.enginecalls import EngineReply, exchange
from offload_core.enginehttp import ResponseReader, error_response, response
from offload_core.errors import NodeLostError, OffloadError, PortTakenError, UsageError

if TYPE_CHECKING:
    import logging
    from collections.abc import Awaitable, Callable, Sequence

    from offload_client.sessions.bindmounts import BindMounts
    from offload_client.sessions.containers import KnownContainers, Source
    from offload_client.sessions.localports import LocalPorts
    from offload_client.sessions.portspecs import Binding
    from offload_client.sessions.tunnel import Tunnel
    from offload_core.enginehttp import RequestHead, RequestReader

    Send = Callable[[bytes], Awaitable[None]]
    Handler = Callable[[RequestHead, RequestReader, Send], Awaitable[None]]

MAX_CREATE = 4 << 20
"""Bytes of a request to create a container."""
EXIT_SECONDS = 60.0
"""How long the end of a container may wait for its files."""
_CONTAINER = re.compile(r"/containers/([^/]+)/(start|restart|stop|kill|wait)")
_ID = re.compile(r"[0-9a-f]{64}")
_REMOVED = re.compile(r"/containers/([^/]+)")
_OWN_HEADERS = frozenset(
    ("content-length", "transfer-encoding", "content-type", "connection", "trailer")
)


class Interception:
    """Answers some requests in place of the engine."""

    def __init__(
        self,
        tunnel: Tunnel,
        known: KnownContainers,
        ports: LocalPorts,
        mounts: BindMounts | None,
        log: logging.Logger,
    ) -> None:
        """Prepare.

        Args:
            tunnel: to the session.
            known: containers that were created here.
            ports: of this machine.
            mounts: synchronises directories; None where that is not possible.
            log: hears of what goes wrong unseen.
        """
        self._tunnel = tunnel
        self._known = known
        self._ports = ports
        self._mounts = mounts
        self._log = log
        self._planned: set[tuple[str, int]] = set()
        """Ports of containers that are being created."""

    def find(self, head: RequestHead) -> Handler | None:
        """Return who answers a request; None for the engine itself."""
        if head.method == "DELETE":
            match = _REMOVED.fullmatch(head.path)
            known = self._known.find(match[1]) if match else None
            return self._stop if known is not None and known.sources else None
        if head.method != "POST":
            return None
        if head.path == "/containers/create":
            return self._create
        match = _CONTAINER.fullmatch(head.path)
        known = self._known.find(match[1]) if match else None
        if match is None or known is None:
            return None
        if match[2] in ("start", "restart") and (known.ports or known.sources):
            return self._start
        if match[2] == "wait" and known.sources:
            return self._wait
        if match[2] in ("stop", "kill") and known.sources:
            return self._stop
        return None

    async def _create(self, head: RequestHead, requests: RequestReader, send: Send) -> None:
        body = await requests.read_body(MAX_CREATE)
        try:
            wanted = json.loads(body)
        except (ValueError, RecursionError):
            # The engine says what is wrong with it.
            wanted = None
        host = wanted.get("HostConfig") if isinstance(wanted, dict) else None
        if not isinstance(host, dict):
            host = {}
        bindings: list[Binding] = []
        published = host.get("PortBindings")
        if published:
            # What is not understood is for the engine to refuse.
            with contextlib.suppress(UsageError):
                bindings, host["PortBindings"] = plan(published, self._promised)
        planned = {(one.protocol, one.port) for one in bindings} - self._planned
        self._planned |= planned
        try:
            sources = await take_sources(host, self._mounts) if _may_bind(host) else []
            if bindings or sources:
                body = json.dumps(wanted).encode()
            reply = await self._ask(head, body)
            name = head.query.get("name", [""])[0].removeprefix("/")
            if reply.status == 201:
                self._created(reply, name, bindings, sources, host)
        finally:
            self._planned -= planned
        await send(_same(reply))

    def _promised(self, protocol: str, port: int) -> bool:
        return (protocol, port) in self._planned or self._known.promised(protocol, port)

    def _created(
        self,
        reply: EngineReply,
        name: str,
        bindings: Sequence[Binding],
        sources: Sequence[Source],
        host: dict[str, Any],
    ) -> None:
        if name:
            self._known.forget_name(name)
        publish_all = bool(host.get("PublishAllPorts"))
        if not (bindings or sources or publish_all):
            return
        told = reply.json()
        container_id = str(told.get("Id")) if isinstance(told, dict) else ""
        if not _ID.fullmatch(container_id) or self._known.has(container_id):
            raise NodeLostError("the docker engine does not say which container it has created")
        self._known.add(
            KnownContainer(
                container_id,
                name,
                tuple(bindings),
                publish_all,
                tuple(sources),
                bool(host.get("AutoRemove")),
            )
        )

    async def _start(self, head: RequestHead, requests: RequestReader, send: Send) -> None:
        body = await requests.read_body(MAX_CREATE)
        known = self._container(head)
        with self._ports.starting(known.container_id):
            await self._start_known(known, head, body, send)

    async def _start_known(
        self, known: KnownContainer, head: RequestHead, body: bytes, send: Send
    ) -> None:
        was_open = self._ports.has(known.container_id)
        try:
            if not was_open:
                self._ports.open(known.container_id, known.name, known.bindings)
        except PortTakenError as error:
            # The container stays as it was, as with an engine of one's own, unless it should go
            # at its end: the client of `docker run --rm` waits for that.
            if known.auto_remove:
                await self._remove(known.container_id)
            await send(error_response(500, self._not_published(known, error)))
            return
        try:
            if known.sources and self._mounts is not None:
                await self._mounts.before_start()
            reply = await self._ask(head, body)
        except BaseException:
            if not was_open:
                self._ports.close(known.container_id)
            raise
        if reply.status >= 400 and not was_open:
            self._ports.close(known.container_id)
        elif known.publish_all and reply.status < 300:
            await self._open_chosen(known)
        await send(_same(reply))

    async def _remove(self, container_id: str) -> None:
        stream = await self._tunnel.engine()
        try:
            reply = await exchange(stream, "DELETE", f"/containers/{container_id}?v=1&force=1")
        finally:
            await stream.aclose()
        if reply.status >= 300:
            self._log.warning("a container that did not start is left: %s", reply.status)

    async def _open_chosen(self, known: KnownContainer) -> None:
        """Listen at the ports that the engine has chosen."""
        found = await self._inspect(known.container_id)
        chosen = {(binding.protocol, binding.port) for binding in known.bindings}
        others = [one for one in found if (one.protocol, one.port) not in chosen]
        try:
            self._ports.open(known.container_id, known.name, (*known.bindings, *others))
        except PortTakenError as error:
            self._log.warning("a port of container %s is not here: %s", known.name, error.message)

    async def _inspect(self, container_id: str) -> list[Binding]:
        stream = await self._tunnel.engine()
        try:
            reply = await exchange(stream, "GET", f"/containers/{container_id}/json")
        finally:
            await stream.aclose()
        if reply.status != 200:
            return []
        told = reply.json()
        network = told.get("NetworkSettings") if isinstance(told, dict) else None
        return from_engine(network.get("Ports")) if isinstance(network, dict) else []

    async def _wait(self, head: RequestHead, requests: RequestReader, send: Send) -> None:
        body = await requests.read_body(MAX_CREATE)
        stream = await self._tunnel.engine()
        try:
            await stream.send(head.replaced(body_length=len(body)) + body)
            replies = ResponseReader(stream.receive)
            answer = await replies.head("POST")
            # At once: a client starts its container only when it knows that somebody waits.
            await send(answer.raw)
            rest = bytearray()
            async for piece in replies.body():
                rest += piece
                if len(rest) > MAX_CREATE:
                    raise NodeLostError("the docker engine says too much of a container's end")
            await self._fetch_files()
            await send(bytes(rest))
        finally:
            await stream.aclose()

    async def _stop(self, head: RequestHead, requests: RequestReader, send: Send) -> None:
        reply = await self._ask(head, await requests.read_body(MAX_CREATE))
        await self._fetch_files()
        await send(_same(reply))

    async def _fetch_files(self) -> None:
        if self._mounts is None:
            return
        try:
            async with asyncio.timeout(EXIT_SECONDS):
                await self._mounts.after_exit()
        except (OffloadError, TimeoutError) as error:
            self._log.warning("files of a container are not all here: %r", error)

    def _container(self, head: RequestHead) -> KnownContainer:
        known = self._known.find(head.path.split("/")[2])
        if known is None:
            raise UsageError("the container was removed meanwhile")
        return known

    async def _ask(self, head: RequestHead, body: bytes) -> EngineReply:
        """Have a request answered by the engine, on a connection of its own."""
        stream = await self._tunnel.engine()
        try:
            await stream.send(head.replaced(body_length=len(body)) + body)
            replies = ResponseReader(stream.receive)
            answer = await replies.head(head.method)
            content = await replies.read_body(MAX_CREATE)
        finally:
            await stream.aclose()
        return EngineReply(answer.status, answer.headers, content)

    def _not_published(self, known: KnownContainer, error: PortTakenError) -> str:
        endpoint = known.name or known.container_id[:12]
        return (
            "failed to set up container networking: driver failed programming external "
            f"connectivity on endpoint {endpoint} ({known.container_id}): {error.message}"
        )


def _may_bind(host: dict[str, Any]) -> bool:
    binds, mounts = host.get("Binds") or [], host.get("Mounts") or []
    if not isinstance(binds, list) or not isinstance(mounts, list):
        # The engine refuses it.
        return False
    return bool(binds or mounts) and all(isinstance(mount, dict) for mount in mounts)


def _same(reply: EngineReply) -> bytes:
    """Return a reply as the engine gave it."""
    headers = dict(reply.headers)
    kind = next((value for key, value in reply.headers if key.lower() == "content-type"), "")
    kept = {name: value for name, value in headers.items() if name.lower() not in _OWN_HEADERS}
    return response(reply.status, reply.body, kind or "application/json", headers=kept)
