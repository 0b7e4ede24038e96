"""The helper of a session: a process that makes an engine on a node look like one of this machine.

It serves the socket for docker clients and the one for our commands, holds the tunnel, listens at
published ports and keeps directories the same. One runs for each session; it ends with it.
Commands start it by `sessions.launch`; by hand it is started with
`python -m offload_client.sessions.helper DIRECTORY`. It has the environment of the member.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from offload_client.connections import Connections
from offload_client.invocation import Invocation
from offload_client.progress.cells import printable
from offload_client.sessions.access import CONNECTION_OPTIONS, GONE, GatewayAccess
from offload_client.sessions.apiproxy import ApiProxy
from offload_client.sessions.containers import KnownContainers
from offload_client.sessions.controlserver import ControlServer
from offload_client.sessions.helperlog import log_tail, open_log
from offload_client.sessions.interception import Interception
from offload_client.sessions.launch import helper_answers
from offload_client.sessions.localports import LocalPorts
from offload_client.sessions.records import (
    LOCK_FILE,
    LOG_FILE,
    RECORD_FILE,
    engine_socket,
    forget_end,
    helper_socket,
    note_end,
    prepare_sockets,
    read_record,
)
from offload_client.sessions.sync.bindmounts import BindMounts as SyncedMounts
from offload_client.sessions.sync.bindsettings import BindSettings
from offload_client.sessions.tunnel import Tunnel
from offload_client.sessions.watching import Watching
from offload_core.aio import TaskSet
from offload_core.errors import NotFoundError, OffloadError
from offload_proto.v1.session_sync_service_pb2_grpc import SessionSyncServiceStub
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from offload_client.sessions.bindmounts import BindMounts
    from offload_client.sessions.records import SessionRecord
    from offload_client.sessions.sync.synclink import SyncCall

    MakeMounts = Callable[[Tunnel, Callable[[str], None]], BindMounts]

CONTAINERS_FILE = "containers.json"
AWAY_SECONDS = 1800.0
"""After so long without its node, a session is given up here."""
TELL_SECONDS = 600.0
"""For so long after the end of a session docker's commands hear why it ended."""
LOOK_SECONDS = 2.0
MAX_WARNINGS = 20
MAX_SHOWN = 1000
LAST_FILES_SECONDS = 60.0
"""How long the end may wait for what containers wrote."""
RUNNING = SessionState.SESSION_STATE_RUNNING
TAKE_OVER_SECONDS = 25.0
"""How long another helper of the same session may take for its end."""
TAKE_OVER_POLL = 0.05
MAX_FILES = 1 << 16
"""Descriptors: two for each connection, of which there may be thousands."""


class Helper:
    """Everything of one session in this process."""

    def __init__(
        self,
        directory: Path,
        record: SessionRecord,
        log: logging.Logger,
        *,
        make_mounts: MakeMounts | None = None,
        away_seconds: float = AWAY_SECONDS,
        tell_seconds: float = TELL_SECONDS,
    ) -> None:
        """Prepare.

        Args:
            directory: of the session.
            record: in it.
            log: of this helper.
            make_mounts: returns what synchronises directories, given the tunnel and who is told
                sentences that people should read; None where that is not possible.
            away_seconds: ends after so long without the node.
            tell_seconds: ends so long after the session.
        """
        self._directory = directory
        self._record = record
        self._log = log
        self._make_mounts = make_mounts
        self._away_seconds = away_seconds
        self._tell_seconds = tell_seconds
        self._stopping = asyncio.Event()
        self._warnings: list[str] = []
        self._node_warnings: list[str] = []
        self._state = 0
        self._started = time.time()

    async def run(self) -> None:
        """Serve until the session is over, or somebody says stop.

        Raises:
            OSError: the sockets cannot be made.
        """
        async with AsyncExitStack() as stack:
            connections = await stack.enter_async_context(
                Connections(persistent=True, options=CONNECTION_OPTIONS)
            )
            access = GatewayAccess(Invocation.of_process([]), connections, self._record)
            tunnel = Tunnel(access, self._record.session_id, self._log)
            tunnel.on_change(lambda: self._keep_warning(tunnel))
            await stack.enter_async_context(tunnel)
            ports = LocalPorts(tunnel, self._log)
            stack.push_async_callback(ports.aclose)
            known = KnownContainers(self._directory / CONTAINERS_FILE)
            mounts = None
            if self._make_mounts is not None:
                mounts = self._make_mounts(tunnel, self._warn)
                stack.push_async_callback(mounts.aclose)
            tasks = TaskSet(on_error=self._failed)
            stack.push_async_callback(tasks.close)
            watching = Watching(tunnel, known, ports, self._log)
            tasks.start(watching.run(), name="watching")
            if mounts is not None and known.sources():
                tasks.start(self._resume(mounts, known), name="resume")
            interception = Interception(tunnel, known, ports, mounts, self._log)
            answers = {
                "status": lambda: self._status(tunnel, ports, mounts),
                "ports": lambda: self._ports(ports),
                "stop": lambda: self._stop(tunnel, mounts),
                "diagnose": lambda: self._diagnose(tunnel),
            }
            proxy = await stack.enter_async_context(
                ApiProxy(engine_socket(self._directory), tunnel, interception, self._log)
            )
            await stack.enter_async_context(
                ControlServer(helper_socket(self._directory), answers, os.getuid())
            )
            self._log.info("serving session %s", self._record.session_id)
            await self._until_over(tunnel, proxy)

    def end(self) -> None:
        """End soon."""
        self._stopping.set()

    async def _until_over(self, tunnel: Tunnel, proxy: ApiProxy) -> None:
        over_at: float | None = None
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._stopping.wait()
            if not self._is_wanted():
                self._log.info("the record of the session is gone")
                return
            if not proxy.in_place:
                self._log.info("docker clients come here no more: the socket is gone, or another's")
                return
            if tunnel.ended.done():
                if over_at is None:
                    over_at = time.monotonic()
                    note_end(self._directory, _shown(tunnel.ended.result()))
                if time.monotonic() - over_at >= self._tell_seconds:
                    return
                continue
            if tunnel.away_seconds > self._away_seconds:
                self._log.info("the session could not be reached for too long")
                return

    def _is_wanted(self) -> bool:
        try:
            return read_record(self._directory).session_id == self._record.session_id
        except NotFoundError:
            return False
        except OffloadError as error:
            # That no file can be opened for a moment ends nothing.
            self._log.info("%s", error.message)
            return True

    async def _resume(self, mounts: BindMounts, known: KnownContainers) -> None:
        """Go on with the directories of containers that were there before this process."""
        for source in known.sources():
            try:
                await mounts.prepare(source.path, read_only=source.read_only)
            except OffloadError as error:
                self._warn(f"{source.path} is not synchronised: {error.message}")

    async def _status(
        self, tunnel: Tunnel, ports: LocalPorts, mounts: BindMounts | None
    ) -> dict[str, Any]:
        news = tunnel.news
        told: dict[str, Any] = {
            "session_id": self._record.session_id,
            "pid": os.getpid(),
            "started": self._started,
            "state": _state_name(news.state) if news is not None else "connecting",
            "reason": _shown(news.reason) if news is not None else "",
            "reconnecting_since": tunnel.reconnecting_since,
            "problem": _shown(tunnel.problem),
            "ports": ports.listing(),
            "directories": mounts.describe() if mounts is not None else [],
            "sent_bytes": tunnel.traffic.sent,
            "received_bytes": tunnel.traffic.received,
            "warnings": self._warnings,
        }
        if tunnel.ended.done():
            gone = news is not None and news.state in GONE
            return told | {
                "state": told["state"] if gone else "ended",
                "reason": _shown(tunnel.ended.result()),
                "reconnecting_since": None,
            }
        if news is not None:
            told["activity"] = _activity(news.activity)
            if news.HasField("remaining"):
                told["remaining_seconds"] = news.remaining.ToMilliseconds() / 1000
        return told

    async def _ports(self, ports: LocalPorts) -> dict[str, Any]:
        return {"ports": ports.listing()}

    async def _stop(self, tunnel: Tunnel, mounts: BindMounts | None) -> dict[str, Any]:
        """End, once what containers wrote is here; say what is not."""
        before = set(self._warnings)
        running = tunnel.news is not None and tunnel.news.state == RUNNING
        reached = tunnel.reconnecting_since is None and not tunnel.ended.done()
        if mounts is not None and running and reached:
            try:
                async with asyncio.timeout(LAST_FILES_SECONDS):
                    await mounts.after_exit()
            except TimeoutError:
                self._warn("some of what containers wrote is not here: it took too long")
        self.end()
        return {"stopping": True, "warnings": [one for one in self._warnings if one not in before]}

    async def _diagnose(self, tunnel: Tunnel) -> dict[str, Any]:
        texts = {"helper.log": log_tail(self._directory / LOG_FILE)}
        try:
            texts |= await tunnel.diagnose()
        except OffloadError as error:
            texts["node"] = error.message
        return {"texts": texts}

    def _keep_warning(self, tunnel: Tunnel) -> None:
        news = tunnel.news
        if news is None:
            return
        if news.state != self._state:
            # What was to come has come.
            self._state = news.state
            self._warnings = [one for one in self._warnings if one not in self._node_warnings]
            self._node_warnings.clear()
        text = _shown(news.warning)
        if text and text not in self._warnings:
            self._node_warnings.append(text)
            self._warn(text)

    def _warn(self, text: str) -> None:
        text = _shown(text)
        if text not in self._warnings:
            self._warnings.append(text)
            del self._warnings[:-MAX_WARNINGS]
            self._log.warning("%s", text)

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("%s failed: %r", name, error)


def _shown(text: str) -> str:
    """Return a text of a node as a terminal may show it."""
    return printable(text)[:MAX_SHOWN]


def _state_name(state: int) -> str:
    if state not in SessionState.values():
        # Of a node that is newer.
        return "unknown"
    return SessionState.Name(SessionState.ValueType(state)).removeprefix("SESSION_STATE_").lower()


def _activity(activity: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "running_containers": activity.running_containers,
        "open_connections": activity.open_connections,
        "received_bytes": activity.received_bytes,
        "sent_bytes": activity.sent_bytes,
        "disk_bytes": activity.disk_bytes,
    }
    for name in ("pauses_at", "removed_at"):
        if activity.HasField(name):
            told[name] = getattr(activity, name).ToMilliseconds() / 1000
    return told


async def serve(directory: Path, *, make_mounts: MakeMounts | None = None) -> int:
    """Be the helper of a session; return an exit code, 0 also when there is one already."""
    try:
        prepare_sockets(directory)
        async with asyncio.timeout(TAKE_OVER_SECONDS):
            lock = await _take_lock(directory)
    except (OffloadError, OSError, TimeoutError):
        return 1
    if lock is None:
        return 0
    log = open_log(directory / LOG_FILE)
    forget_end(directory)
    try:
        helper = Helper(directory, read_record(directory), log, make_mounts=make_mounts)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, helper.end)
        await helper.run()
        log.info("the helper ends")
    except (OffloadError, OSError) as error:
        log.error("the helper cannot run: %s", error)
        return 1
    finally:
        os.close(lock)
    return 0


def make_mounts(tunnel: Tunnel, warn: Callable[[str], None]) -> BindMounts:
    """Return what synchronises directories of this machine with a session.

    Raises:
        ConfigError: config.toml is wrong.
    """

    async def open_call() -> SyncCall:
        channel, metadata = await tunnel.channel()
        call: SyncCall = SessionSyncServiceStub(channel).Sync(metadata=metadata)
        return call

    settings = BindSettings.of(Invocation.of_process([]))
    return SyncedMounts(open_call, (os.getuid(), os.getgid()), settings, warn)


async def _take_lock(directory: Path) -> int | None:
    """Return the lock, as soon as a helper that ends has left it; None when one serves.

    Raises:
        OSError: there is no file for it.
    """
    path = directory / LOCK_FILE
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        taken = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who locks a file that is removed meanwhile is not alone.
            taken = os.path.samestat(os.fstat(lock), path.lstat())
        except (BlockingIOError, FileNotFoundError):
            if await helper_answers(directory):
                return None
        finally:
            if not taken:
                os.close(lock)
        if taken:
            return lock
        await asyncio.sleep(TAKE_OVER_POLL)


def _allow_files() -> None:
    """Take as many descriptors as this process may have; 1024 are usual otherwise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(directory: Path) -> NoReturn:
    """Be the helper of the session in a directory; ends the process."""
    _allow_files()
    sys.exit(asyncio.run(serve(directory, make_mounts=make_mounts)))


def main() -> None:
    """Run the helper of the session in the directory that the command line names."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / RECORD_FILE).is_file():
        sys.exit("usage: python -m offload_client.sessions.helper DIRECTORY")
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
