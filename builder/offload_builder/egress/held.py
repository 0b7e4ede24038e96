"""The policies that a node holds: what the gateway said last, also while it does not answer.

They lie in one file of the data directory and are replaced as a whole. Whatever is wrong with new
ones, the former stay in force.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import structlog

from offload_builder.egress.policy.merging import merge
from offload_builder.egress.policy.model import DEFAULT_POLICY, Layer, Policy, Posture
from offload_builder.egress.policy.reading import read_text
from offload_core.errors import ConfigError
from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from offload_proto.v1.nodes_service_pb2 import AttachResponse

log = structlog.get_logger(__name__)

RETRY_SECONDS = 5.0
"""When a listener could not do what it should."""
NOT_ENFORCED = "the node could not put the newest egress policies in force; its log says why"
CLOSED = Policy(posture=Posture.ALLOWLIST, source="unreadable policies of this node")
"""Where the file cannot be read: nothing is reached until the gateway says more."""
_POOL = ""


@dataclass(frozen=True)
class HeldText:
    """A policy as the gateway sent it."""

    version: int
    file: str
    text: str


@dataclass(frozen=True)
class Held:
    """All policies at one time; never changed, only replaced.

    Attributes:
        texts: by project; that of the pool under an empty name.
        policies: by project, merged with the pool's; others have the pool's.
        heard: the gateway has said something, in this life of the node or a former one.
    """

    texts: Mapping[str, HeldText] = field(default_factory=dict)
    pool: Policy = DEFAULT_POLICY
    policies: Mapping[str, Policy] = field(default_factory=dict)
    heard: bool = False

    @property
    def says_something(self) -> bool:
        """Whether there is a policy beside the one of those who wrote none."""
        return bool(self.texts) or self.pool is not DEFAULT_POLICY

    def of_project(self, project_id: str) -> Policy:
        """Return what holds for the builds of a project."""
        return self.policies.get(project_id, self.pool)

    def versions(self) -> dict[str, int]:
        """Return the versions by project, that of the pool under an empty name."""
        return {scope: item.version for scope, item in self.texts.items()}


class HeldPolicies:
    """Use as an async context manager; belongs to the event loop.

    Listeners are called with each new state, one state after the other, and again when a rule of
    one has expired. A listener that fails is called again, until it does not.
    """

    def __init__(self, path: Path) -> None:
        """Remember where the file lies; its directory exists."""
        self._path = path
        self._held = self._told = Held()
        self._listeners: list[Callable[[Held], Awaitable[None]]] = []
        self._news: AttachResponse | None = None
        self._settled = True
        self.problem = ""
        """One sentence on why former policies are in force; empty when the newest are."""
        self.on_outcome: Callable[[], None] | None = None
        """Called whenever `versions_in_force` or `problem` may have changed."""
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        # Reading thousands of rules takes seconds, in which the node must answer.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="egress-policies")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Read what an earlier process kept."""
        loop = asyncio.get_running_loop()
        self._held = self._told = await loop.run_in_executor(self._executor, _load, self._path)
        self._task = asyncio.create_task(self._run(), name="egress-policies")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop; policies that were not taken yet come again when the node attaches again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._executor.shutdown(wait=False)

    @property
    def held(self) -> Held:
        """What holds now."""
        return self._held

    def versions_in_force(self) -> dict[str, int]:
        """Return the versions that all listeners have taken, those of the kernel's rules."""
        return self._told.versions()

    def of_project(self, project_id: str) -> Policy:
        """Return what holds now for the builds of a project."""
        return self._held.of_project(project_id)

    def on_change(self, listener: Callable[[Held], Awaitable[None]]) -> None:
        """Call a listener with every new state, soon after it holds."""
        self._listeners.append(listener)

    def take_message(self, message: AttachResponse) -> None:
        """Take what the gateway says over the stream of a node; of several, the last one counts."""
        self._news = message
        self._settled = False
        self._wake.set()

    async def wait_for(self, condition: Callable[[Held], bool]) -> Held:
        """Wait until all listeners have taken a state for which something is true."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self._told))
        return self._told

    async def settled(self) -> Held:
        """Wait until nothing is left to take; whoever starts a build then starts it under the news.

        Bound it with a timeout: a listener may fail for long.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._settled)
        return self._told

    async def _run(self) -> None:
        failed = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if failed else self._seconds_left()):
                    await self._wake.wait()
            self._wake.clear()
            message, self._news = self._news, None
            news = message is not None and await self._take(message)
            # Without a message, a rule has expired, or listeners have failed.
            if news or message is None or failed:
                failed = not await self._tell(self._held)
                if failed:
                    self.problem = self.problem or NOT_ENFORCED
                elif self.problem == NOT_ENFORCED:
                    self.problem = ""
            async with self._changed:
                if not failed:
                    self._told = self._held
                    self._settled = self._news is None
                self._changed.notify_all()
            if self.on_outcome is not None:
                self.on_outcome()

    async def _take(self, message: AttachResponse) -> bool:
        """Take what a message says; return whether that is news."""
        texts = {
            item.project_id: HeldText(item.version, item.file, item.text)
            for item in message.egress_policies.policies
        }
        if self._held.heard and texts == self._held.texts:
            self.problem = ""
            return False
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._executor, _take, self._path, texts)
        except Exception as error:
            log.error("egress.policies.refused", exc_info=error)
            first = error.message.partition("\n")[0] if isinstance(error, ConfigError) else error
            self.problem = f"the node keeps its former egress policies: {first}"
            return False
        self.problem = ""
        self._held = found
        log.info("egress.policies.taken", versions=_named(found.versions()))
        return True

    def _seconds_left(self) -> float | None:
        """Return when the next rule expires; None for never."""
        now = datetime.now(UTC)
        policies = (self._held.pool, *self._held.policies.values())
        ends = [end for policy in policies if (end := policy.next_change(now)) is not None]
        return (min(ends) - now).total_seconds() + 0.001 if ends else None

    async def _tell(self, held: Held) -> bool:
        worked = True
        for listener in self._listeners:
            try:
                await listener(held)
            except Exception as error:
                log.error("egress.policies.not_enforced", exc_info=error)
                worked = False
        return worked


def _take(path: Path, texts: dict[str, HeldText]) -> Held:
    """Read new policies and keep them.

    Raises:
        ConfigError: one cannot be read; the file is as it was.
    """
    found = _read(texts)
    raw = {scope: vars(item) for scope, item in texts.items()}
    try:
        replace_small_file(path, json.dumps(raw).encode(), durable=True)
    except OSError as error:
        # They hold all the same; the gateway tells them again at the next start.
        log.error("egress.policies.not_kept", path=str(path), cause=str(error))
    return found


def _load(path: Path) -> Held:
    try:
        raw: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
        texts = {
            str(scope): HeldText(int(item["version"]), str(item["file"]), str(item["text"]))
            for scope, item in raw.items()
        }
        return _read(texts)
    except FileNotFoundError:
        return Held()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        log.error("egress.policies.unreadable", path=str(path), cause=str(error))
        return Held(pool=CLOSED)


def _read(texts: Mapping[str, HeldText]) -> Held:
    """Return policies out of their texts.

    Raises:
        ConfigError: one cannot be read.
    """
    pool = _policy(texts[_POOL], Layer.POOL) if _POOL in texts else DEFAULT_POLICY
    policies: dict[str, Policy] = {}
    for scope, item in texts.items():
        if scope == _POOL:
            continue
        merged = merge(pool, _policy(item, Layer.PROJECT))
        for finding in merged.refused:
            log.warning("egress.policy.rule_left_out", project_id=scope, why=str(finding))
        policies[scope] = merged.policy
    return Held(dict(texts), pool, policies, heard=True)


def _policy(item: HeldText, layer: Layer) -> Policy:
    # Even a version of 0 is a stored one here: rules may have expired.
    version = max(item.version, 1)
    return read_text(item.text, file=item.file, layer=layer, version=version).require()


def _named(versions: dict[str, int]) -> dict[str, int]:
    return {scope or "pool": version for scope, version in versions.items()}
