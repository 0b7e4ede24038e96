"""Watching the containers of a session, so that ports of this machine come and go with them.

Containers come and go by themselves too: at their end, by a restart policy, by a colleague. They
are watched only while some run, as a session that is watched is in use. Only containers that a
docker client of this machine has created get ports here: what else a node tells of would let it
listen on this machine wherever it likes.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from offload_client.sessions.portspecs import from_engine
from offload_core.aio import TaskSet, stop
from offload_core.enginecalls import call_engine, json_lines, stream_engine
from offload_core.errors import NodeLostError, OffloadError, PortTakenError

if TYPE_CHECKING:
    import logging

    from offload_client.sessions.containers import KnownContainers
    from offload_client.sessions.localports import LocalPorts
    from offload_client.sessions.tunnel import Tunnel

EVENTS = ("start", "die", "destroy", "rename")
_EVENTS_TARGET = "/events?filters=" + quote(json.dumps({"type": ["container"], "event": EVENTS}))
RESTART_SECONDS = 0.2
"""A container that starts again within this keeps its ports."""
AGAIN_SECONDS = 1.0


class Watching:
    """Opens and closes ports as containers start and end."""

    def __init__(
        self, tunnel: Tunnel, known: KnownContainers, ports: LocalPorts, log: logging.Logger
    ) -> None:
        """Prepare.

        Args:
            tunnel: to the session.
            known: containers that were created here.
            ports: of this machine.
            log: hears of ports that cannot be had.
        """
        self._tunnel = tunnel
        self._known = known
        self._ports = ports
        self._log = log
        self._connect = partial(tunnel.engine, wake=False)
        self._changed = asyncio.Event()
        self._ending: dict[str, asyncio.TimerHandle] = {}
        self._tasks = TaskSet()
        tunnel.on_change(self._changed.set)
        ports.on_change = self._changed.set

    async def run(self) -> None:
        """Watch, whenever there is something to be seen, until cancelled."""
        watching: asyncio.Future[None] | None = None
        try:
            while True:
                self._changed.clear()
                if self._tunnel.paused or self._tunnel.ended.done():
                    self._ports.keep_only(())
                wanted = self._wanted()
                if wanted and watching is None:
                    watching = asyncio.ensure_future(self._watch())
                elif not wanted and watching is not None:
                    await stop(watching)
                    watching = None
                await self._changed.wait()
        finally:
            if watching is not None:
                await stop(watching)
            for timer in self._ending.values():
                timer.cancel()
            await self._tasks.close()

    def _wanted(self) -> bool:
        if self._tunnel.paused or self._tunnel.ended.done():
            return False
        news = self._tunnel.news
        return bool(self._ports) or (news is not None and news.activity.running_containers > 0)

    async def _watch(self) -> None:
        while True:
            try:
                async with stream_engine(self._connect, _EVENTS_TARGET) as pieces:
                    await self._compare()
                    async for event in json_lines(pieces):
                        self._take(event)
            except OffloadError as error:
                self._log.info("containers are not watched: %s", error.message)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _compare(self) -> None:
        """Open and close ports for what runs now."""
        before, settled = self._known.ids(), self._ports.settled()
        reply = await call_engine(self._connect, "GET", "/containers/json?all=1")
        if reply.status != 200:
            raise NodeLostError(f"the docker engine lists no containers: {reply.message}")
        present = _by_id(reply.json())
        for container_id in before - present.keys():
            self._known.remove(container_id)
        running = {key for key, one in present.items() if one.get("State") in ("running", "paused")}
        for container_id in settled - running:
            self._ports.close(container_id)
        for container_id in running:
            await self._open(container_id)

    def _take(self, event: Any) -> None:
        actor = event.get("Actor") if isinstance(event, dict) else None
        container_id = str(actor.get("ID") or "") if isinstance(actor, dict) else ""
        if not isinstance(actor, dict) or not self._known.has(container_id):
            return
        action = str(event.get("Action") or "")
        if action == "start":
            if (timer := self._ending.pop(container_id, None)) is not None:
                timer.cancel()
            self._tasks.start(self._open(container_id), name="open-ports")
        elif action == "die":
            loop = asyncio.get_running_loop()
            if (timer := self._ending.pop(container_id, None)) is not None:
                timer.cancel()
            self._ending[container_id] = loop.call_later(RESTART_SECONDS, self._ended, container_id)
        elif action == "destroy":
            self._ended(container_id)
            self._known.remove(container_id)
        elif action == "rename":
            attributes = actor.get("Attributes")
            if isinstance(attributes, dict):
                self._known.rename(container_id, str(attributes.get("name", "")))

    def _ended(self, container_id: str) -> None:
        if (timer := self._ending.pop(container_id, None)) is not None:
            timer.cancel()
        self._ports.close(container_id)

    async def _open(self, container_id: str) -> None:
        known = self._known.by_id(container_id)
        if known is None or not known.ports:
            return
        if self._ports.has(container_id) and not known.publish_all:
            return
        bindings = list(known.bindings)
        try:
            if known.publish_all:
                reply = await call_engine(self._connect, "GET", f"/containers/{container_id}/json")
                if reply.status != 200 or not reply.json()["State"]["Running"]:
                    return
                found = from_engine(reply.json()["NetworkSettings"].get("Ports"))
                own = {(binding.protocol, binding.port) for binding in bindings}
                bindings += [one for one in found if (one.protocol, one.port) not in own]
            self._ports.open(container_id, known.name, bindings)
        except PortTakenError as error:
            name = known.name or container_id[:12]
            self._log.warning("container %s: %s", name, error.message)
        except (OffloadError, AttributeError, KeyError, TypeError) as error:
            self._log.info("the ports of container %s are not known: %r", container_id[:12], error)


def _by_id(listed: Any) -> dict[str, dict[str, Any]]:
    """Return the containers of an engine's list.

    Raises:
        NodeLostError: it is none.
    """
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise NodeLostError("the docker engine's list of containers is none")
    return {str(one.get("Id")): one for one in listed}
