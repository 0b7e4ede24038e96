"""The ports of this machine that belong to containers of a session."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_client.sessions.listeners import TcpListener, UdpListener
from offload_client.sessions.portspecs import Binding, bind
from offload_core.aio import TaskSet, finish
from offload_core.errors import PortTakenError

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable, Iterator

    from offload_client.sessions.tunnel import Tunnel

CLOSE_SECONDS = 6.0


@dataclass
class _Opened:
    name: str
    bindings: tuple[Binding, ...]
    listeners: list[TcpListener | UdpListener] = field(default_factory=list)


class LocalPorts:
    """Listeners by container."""

    def __init__(self, tunnel: Tunnel, log: logging.Logger) -> None:
        self._tunnel = tunnel
        self._log = log
        self._opened: dict[str, _Opened] = {}
        self._starting: set[str] = set()
        self._closing = TaskSet()
        self.on_change: Callable[[], None] = lambda: None
        """Called when a container gets ports, or loses them."""

    def __bool__(self) -> bool:
        return bool(self._opened)

    def open(self, container_id: str, name: str, bindings: Iterable[Binding]) -> None:
        """Listen at the ports of a container; those that it has already are kept.

        Args:
            container_id: whole.
            name: for people.
            bindings: its ports.

        Raises:
            PortTakenError: one cannot be used; none is open then. The text is as docker's.
        """
        wanted = tuple(bindings)
        known = self._opened.get(container_id)
        if known is not None and set(known.bindings) == set(wanted):
            return
        self.close(container_id)
        opened = _Opened(name, wanted)
        for binding in wanted:
            try:
                bound = bind(binding)
            except OSError as error:
                self._end(opened)
                raise PortTakenError(_told(binding, error, ours=self._is_ours(binding))) from error
            kind = TcpListener if binding.protocol == "tcp" else UdpListener
            opened.listeners += [kind(made, binding, self._tunnel) for made in bound]
        if wanted:
            self._opened[container_id] = opened
            self.on_change()

    def close(self, container_id: str) -> None:
        """Listen no more for a container; nothing happens when it has no ports."""
        opened = self._opened.pop(container_id, None)
        if opened is not None:
            self._end(opened)
            self.on_change()

    def _is_ours(self, wanted: Binding) -> bool:
        return any(
            (wanted.protocol, wanted.port) == (binding.protocol, binding.port)
            for opened in self._opened.values()
            for binding in opened.bindings
        )

    @contextmanager
    def starting(self, container_id: str) -> Iterator[None]:
        """Say that a container starts, which an engine does not list yet."""
        self._starting.add(container_id)
        try:
            yield
        finally:
            self._starting.discard(container_id)

    def settled(self) -> set[str]:
        """Return the containers with ports that an engine lists when it is asked now."""
        return self._opened.keys() - self._starting

    def keep_only(self, container_ids: Iterable[str]) -> None:
        """Listen no more for other containers."""
        for container_id in self._opened.keys() - set(container_ids):
            self.close(container_id)

    def has(self, container_id: str) -> bool:
        """Return whether a container has open ports."""
        return container_id in self._opened

    def listing(self) -> list[dict[str, Any]]:
        """Return what is open, for people and scripts."""
        return [
            {
                "container": container_id[:12],
                "name": opened.name,
                "address": address,
                "port": binding.port,
                "container_port": binding.container_port,
            }
            for container_id, opened in self._opened.items()
            for binding in opened.bindings
            for address in binding.addresses
        ]

    async def aclose(self) -> None:
        """Close everything."""
        self.keep_only(())
        await finish(self._closing.drain(CLOSE_SECONDS), CLOSE_SECONDS + 1)
        await self._closing.close()

    def _end(self, opened: _Opened) -> None:
        for listener in opened.listeners:
            # The port is free at once; connections that are open take a moment.
            listener.close()
            self._closing.start(listener.aclose(), name="close-port")


def _told(binding: Binding, error: OSError, *, ours: bool) -> str:
    address = binding.host_ip or "0.0.0.0"  # noqa: S104 - as docker writes it
    place = f"[{address}]:{binding.port}" if ":" in address else f"{address}:{binding.port}"
    if error.errno == errno.EADDRINUSE and ours:
        return f"Bind for {place} failed: port is already allocated"
    if error.errno == errno.EADDRINUSE:
        return f"failed to bind host port {place}/{binding.protocol}: address already in use"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Bind for {place} failed: this machine allows it to no ordinary user"
    return f"Bind for {place} failed: {error.strerror}"
