"""A build that a BuildKit client runs itself, as the agent knows it: slot, log, cache, record.

BuildKit solves for its own client here; this object opens the project's BuildKit and cache for it,
listens to its progress, and says how it ended. Unlike our own builds it exports its cache in the
client's solve, because nobody else has the client's files afterwards; or beside it, see
`laterexport`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from contextlib import aclosing
from typing import TYPE_CHECKING

from offload_builder.buildkit.controlapi import cleaned_status
from offload_builder.buildkit.failure import SolveFailure, failure_from_status
from offload_builder.buildkit.notes import ProgressNote, status_message
from offload_builder.buildkit.providers import SessionProviders
from offload_builder.buildkit.session import BkSession
from offload_builder.buildkit.sessionproxy import SessionProxy
from offload_builder.buildkit.solve import Attributed, SolveResult
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.job import BuildJob
from offload_builder.node.proxy.laterexport import LaterExport, can_wait
from offload_builder.node.proxy.relay import relay_in_session
from offload_builder.node.solveplan import EXPORT_ATTRIBUTES
from offload_core.errors import UsageError
from offload_proto.v1.node_service_pb2 import Failure, Success

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path
    from typing import Any

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.buildkit.controlapi import SolveOrder
    from offload_builder.buildkit.h2.messages import GrpcError
    from offload_builder.buildkit.h2.stream import Http2Stream
    from offload_builder.node.proxy.feed import StatusFeed
    from offload_builder.node.proxy.policy import Wish
    from offload_proto.v1.events_pb2 import ProgressBatch

LINGER_SECONDS = 0.05
HEAR_SECONDS = 5.0
"""BuildKit ends the progress of a solve before it answers it; a busy node may read it later."""
FAULT_NOTE = "cached content could not be read and is left out from now on; start the build again"
REPAIR_NOTE = "cached content could not be read; its steps are built again"
MIN_REF_LENGTH = 16
"""Of names that are random enough for one of the same length to be another's."""
_SENDING = ("sending tarball", "copying files")
"""What BuildKit's exporters report when the client gets the result: that cannot be done twice."""
# The user waits for this export: the level that costs least.
_EXPORT = {key: value for key, value in EXPORT_ATTRIBUTES.items() if key != "compression-level"}


def _no_login(_host: str) -> bool:
    return False


def new_ref(ref: str) -> str:
    """Return another name for a build, as long as the former one."""
    return secrets.token_hex((len(ref) + 1) // 2)[: len(ref)]


class FeedLink(ClientLink):
    """A link to a client that understands nothing but BuildKit's progress."""

    def __init__(self, feed: StatusFeed, key: str) -> None:
        super().__init__()
        self._feed = feed
        self._key = key
        self._notes = 0
        self.ask_login: Callable[[str], Awaitable[tuple[str, str]]] | None = None
        """Asks the client's session, while it is open here."""

    async def notice(self, text: str, *, level: str = "warning") -> None:
        """Show a sentence as a step of its own."""
        self._notes += 1
        note = ProgressNote(f"{self._key}-{self._notes}", f"[offload] {level}")
        self._feed.tell(note.begin(text))
        self._feed.tell(note.end())

    async def request_credentials(self, host: str, repository: str = "") -> tuple[str, str]:  # noqa: ARG002
        """Return what the client's own session has for a registry."""
        return await self.ask_login(host) if self.ask_login is not None else ("", "")


class _Overheard:
    """The progress of a solve, for the journal, and as it comes for the client."""

    def __init__(self, client: BuildkitClient, job: RelayedJob, feed: StatusFeed) -> None:
        self._client = client
        self._job = job
        self._feed = feed

    async def status(self, ref: str) -> AsyncGenerator[ProgressBatch]:
        """Do as `BuildkitClient.status`."""
        complete = False
        try:
            async with aclosing(self._client.status_messages(ref)) as runs:
                async for raw, batch in runs:
                    if any(item.id.startswith(_SENDING) for item in batch.statuses):
                        self._job.sending = True
                    await self._feed.put(self._job.readable(raw, batch))
                    yield batch
            await self._job.egress_settled()
            complete = True
        finally:
            self._job.heard(complete=complete)


class RelayedJob(BuildJob):
    """`run` lasts from the ticket until the client's solve has ended.

    Attributes:
        ref: name of the build at BuildKit; the client's own until it has to be repeated.
        ready: is done when requests of the build can be sent to BuildKit.
        stopped: set when the node has ended it.
        answered: it is known how the client's solve has ended.
        sending: the client gets the result, or has it.
    """

    def __init__(self, *arguments: Any, wish: Wish, order: SolveOrder, feed: StatusFeed) -> None:
        """Take the arguments of `BuildJob`, what the client wants and asks for."""
        super().__init__(*arguments)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopped = asyncio.Event()
        self.wish = wish
        self._order = order
        self.ref = order.ref
        self._feed = feed
        self.answered = self.sending = False
        self._heard_all = asyncio.Event()
        self._later: LaterExport | None = None
        self._all_exported, self._nothing_new = True, False
        self._answer: asyncio.Future[dict[str, str] | SolveFailure]
        self._verdict: asyncio.Future[bool]
        self._begin_answer()
        self._may_repeat = True
        self._attempts = 0
        self._publications: list[int] | None = None
        self._rules_session = ""
        if self.urls is not None:
            # buildx shows such reasons from 0.31 on.
            self.urls.tells_sources = True

    @property
    def socket(self) -> Path:
        """Where the project's BuildKit listens; only when `ready`."""
        return self._client.socket_path

    def _begin_answer(self) -> None:
        loop = asyncio.get_running_loop()
        self._answer, self._verdict = loop.create_future(), loop.create_future()

    def session_proxy(self, client: Http2Stream, daemon: Http2Stream) -> SessionProxy | None:
        """Return what stands in the middle of the client's session; None when nothing has to.

        Args:
            client: stream of the client's Session call.
            daemon: stream of the same call at the daemon.
        """
        logins = self._runtime.pool_logins
        if logins is not None and not logins.any_host:
            logins = None
        rules = self.urls if self.wish.asks_client else None
        # Every byte of the context would be read here once more for nothing.
        if logins is None and rules is None:
            return None
        holds = _no_login if logins is None else logins.has_login
        proxy = SessionProxy(
            client, daemon, holds, self._credentials, self.secrets.note, relay_in_session, rules
        )
        if logins is not None and isinstance(self.link, FeedLink):
            self.link.ask_login = proxy.login
        return proxy

    @property
    def entitlements(self) -> list[str]:
        """Rights that the build has."""
        return self._rights.entitlements

    @property
    def policy_session(self) -> str:
        """Session that BuildKit asks about sources; empty to leave that to the client's own.

        That one goes through `session_proxy`, where our rules are asked first.
        """
        return self._rules_session

    @property
    def imports(self) -> list[Attributed]:
        """Caches that BuildKit is to read; the pool's comes first."""
        if not self.cache.imports:
            return list(self.wish.imports)
        return [Attributed("registry", {"ref": self.cache.import_name}), *self.wish.imports]

    @property
    def exports(self) -> list[Attributed]:
        """Caches that BuildKit is to write with the build; the pool's comes first."""
        own = [] if self._later is not None else self._own_exports()
        return [*own, *self.wish.exports]

    def _own_exports(self) -> list[Attributed]:
        if not self._ticket.write_scope:
            return []
        return [Attributed("registry", {"ref": self.cache.export_name, **_EXPORT})]

    @property
    def later(self) -> LaterExport | None:
        """What exports the pool's cache after the build if something is new; None for within it."""
        return self._later

    def _may_wait(self) -> bool:
        """Whether all that is in the cache is exported already, so that perhaps nothing is new."""
        if not self.cache.is_exported:
            return False
        return can_wait(self._order) and not (self.imports or self.wish.exports)

    def heard(self, *, complete: bool) -> None:
        """Hear that BuildKit tells no more of a solve; whether that was everything."""
        self._nothing_new = complete and self._all_cached
        self._heard_all.set()
        # A solve that may be repeated has more to tell.
        if self._is_last and (self._later is None or self._nothing_new):
            self._feed.finish()

    async def export_later(self) -> None:
        """Export what is new, if it was not exported with the build; the client waits for it."""
        if self._later is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEAR_SECONDS):
                await self._heard_all.wait()
        if not self._nothing_new:
            self._all_exported = await self._later.make()
        self._feed.finish()

    def readable(self, raw: bytes, batch: ProgressBatch) -> bytes:
        """Return a message of progress without what nobody may see, and what is repaired.

        Args:
            raw: as BuildKit has sent it.
            batch: the same in our terms.
        """
        repaired = [item.digest for item in batch.vertices if self._is_repaired(item.error)]
        if repaired or self.cache.capability.encode() in raw:
            return cleaned_status(raw, self.cache.readable, repaired)
        return raw

    def _is_repaired(self, error: str) -> bool:
        return bool(error) and not self._is_last and SolveFailure(message=error).is_cache_fault

    @property
    def _is_last(self) -> bool:
        kept = self.sending or not self.cache.imports or not self._may_repeat
        return kept or len(self.ref) < MIN_REF_LENGTH

    def worked(self, notes: dict[str, str]) -> None:
        """Hear that the client's solve has ended well."""
        self.answered = True
        if not self._answer.done():
            self._answer.set_result(notes)

    def repairs(self, error: GrpcError) -> bool:
        """Say whether a solve that fails so is repeated."""
        return not self._is_last and failure_from_status(error).is_cache_fault

    async def failed(self, error: GrpcError, *, may_repeat: bool) -> bool:
        """Hear that the client's solve has failed.

        Args:
            error: of BuildKit.
            may_repeat: the same could be asked once more.

        Returns:
            Whether it is to be asked once more, with the `imports` that there are then.
        """
        self._may_repeat, verdict = may_repeat, self._verdict
        failure = failure_from_status(error)
        self.answered = not self.repairs(error)
        if not self._answer.done():
            self._answer.set_result(failure)
        if self.answered:
            return False
        await asyncio.wait((verdict,))
        self.answered = not verdict.result()
        return verdict.result()

    def say_error(self, message: str) -> str:
        """Return what the client is told of an error: nothing secret, and who permits a right."""
        why = self._rights.explain_refusal(message)
        return "\n".join(filter(None, (self.cache.readable(message), why)))

    async def explain_loss(self, reason: str) -> str:
        """Return why BuildKit went away, in one sentence."""
        if not self.ready.done() or self.ready.cancelled():
            return reason
        return (await self._client.lost_error("run the build", reason)).message

    async def _run(self) -> Success | Failure:
        try:
            await self._open_cache()
            if await self._client.has_record(self.ref):
                # The new one would take the record's place.
                raise UsageError(f"there is a build {self.ref} already")
            await self._tell_cache_problem()
            return await self._accompany()
        finally:
            self.stopped.set()
            self._feed.finish()
            if not self._verdict.done():
                self._verdict.set_result(False)
            if not self.ready.done():
                self.ready.cancel()

    async def _accompany(self) -> Success | Failure:
        mounts = self._mounts()
        await self._open_rules()
        with self._runtime.building(mounts):
            outcome = await self._attempt()
            while isinstance(outcome, SolveFailure) and await self._repaired(outcome):
                outcome = await self._attempt()
            mounts.worked = isinstance(outcome, SolveResult)
        if isinstance(outcome, SolveFailure):
            failure = outcome.to_message()
            await self._rights.explain(failure)
            return failure
        self.image_digest = outcome.exporter_response.get("containerimage.digest", "")
        self._publications = self.cache.exported_within(
            whole=self._all_exported, all_cached=self._all_cached
        )
        return Success(exporter_response=self.cache.readable_values(outcome.exporter_response))

    def _show(self, raw: bytes) -> None:
        # Of an export, which needs no repair.
        self._feed.tell(cleaned_status(raw, self.cache.readable))

    def _say(self, news: ProgressBatch) -> None:
        self._feed.tell(status_message(news))
        super()._say(news)

    async def _open_rules(self) -> None:
        """Open a session in which BuildKit asks us about sources, unless it asks the client's."""
        if self.urls is None or self.wish.asks_client:
            return
        providers = SessionProviders(rules=self.urls)
        session = BkSession(self._client, self.build_id, providers)
        self._rules_session = (await self._stack.enter_async_context(session)).id

    async def _ended(self) -> SolveResult | SolveFailure:
        answer = await self._answer
        return answer if isinstance(answer, SolveFailure) else SolveResult(answer)

    async def _attempt(self) -> SolveResult | SolveFailure:
        """Follow one solve from its beginning to its end."""
        verdict = self._verdict
        self._steps.begin_attempt()
        self._repeats.begin_attempt(
            last=self._is_last, cache_import=self.cache.import_name if self._attempts else ""
        )
        overheard = _Overheard(self._client, self, self._feed)
        self._heard_all.clear()
        self._attempts += 1
        async with self._progress.following(overheard, self.ref):
            if self._attempts > 1:
                self._begin_answer()
                verdict.set_result(True)
            else:
                if self._may_wait():
                    self._later = LaterExport(
                        self._client, self.build_id, self._own_exports(), self._show
                    )
                self.ready.set_result(None)
            return await self._registries.guard(self._ended())

    async def _repaired(self, failure: SolveFailure) -> bool:
        """Leave what could not be read out of the next import; say whether to build again."""
        if not (failure.is_cache_fault and self.cache.imports):
            return False
        kept = await self._note_fault(failure)
        useless = await self.cache.offer(after_fault=True) is None
        if self._is_last:
            await self.link.notice(FAULT_NOTE)
            return False
        if self._attempts == 1:
            await self.link.notice(REPAIR_NOTE)
        # The second time that it fails, or when nothing whole is left: without the pool's cache.
        self.cache.imports = not (kept or useless or self._attempts > 1)
        # BuildKit knows a name for some time after its build, and its record is of no use.
        former, self.ref = self.ref, new_ref(self.ref)
        await self._client.forget(former)
        return True

    async def linger(self) -> None:
        """Let the client's last calls go first; they come at once after the end of its solve."""
        known = self._answer.done() and not self._answer.cancelled()
        if known and isinstance(self._answer.result(), dict):
            await asyncio.sleep(LINGER_SECONDS)

    def will_publish(self) -> bool:
        """Say whether the solve has written cache records, and set the state of the cache."""
        nothing_new = self._later is not None and self._nothing_new
        return self.cache.note_export(self._publications, nothing_new=nothing_new)

    async def export_cache(self) -> list[int] | None:
        """Return the publications of what the client's solve has exported."""
        return self._publications
