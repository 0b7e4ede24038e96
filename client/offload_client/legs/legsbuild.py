"""One build on several nodes at once, and what becomes of its parts."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_client.bake.sharedscan import SharedContexts
from offload_client.build.buildrun import BuildPart, BuildRun
from offload_client.bytepipe import in_thread
from offload_client.goboolean import parse_boolean
from offload_client.interrupts import Interrupts
from offload_client.legs.archives import join_layouts, join_trees, remove
from offload_client.legs.display import LegDisplay
from offload_client.legs.image import JoinedImage, join_images
from offload_client.legs.indexpush import push_index
from offload_client.legs.options import (
    ARCHIVES,
    INSECURE,
    archive,
    check_legs,
    leg_options,
    leg_outputs,
    leg_warning,
    push_names,
)
from offload_core.aio import finish
from offload_core.errors import BuildCanceledError, InternalError, find_offload_error
from offload_proto.v1.build_spec_pb2 import ImageDescriptor
from offload_proto.v1.builds_service_pb2 import BuildStats
from offload_proto.v1.node_service_pb2 import Failure, Result, Success

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.imagesource import NodeImageSource
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.build.privateinputs import PrivateInputs
    from offload_client.build.results import Results
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.load.source import ImageSource
    from offload_client.progress.display import Display
    from offload_client.settings import Settings
    from offload_proto.v1.builds_service_pb2 import Assigned

    Hold = Callable[[Result, ImageSource], Awaitable[None]]

DIGEST = "containerimage.digest"
DESCRIPTOR = "containerimage.descriptor"
"""BuildKit's names (exporter/containerimage/exptypes)."""
KEEP_SECONDS = 120.0
CLOSE_SECONDS = 30.0


class _LegFailedError(Exception):
    """A leg has ended with a failure."""

    def __init__(self, assigned: Assigned, failure: Failure, result: Result) -> None:
        super().__init__(failure.message)
        self.assigned = assigned
        self.result = Result(failure=failure, stats=result.stats)


@dataclass
class _Leg:
    platforms: tuple[str, ...]
    folder: Path
    display: LegDisplay
    build: BuildRun | None = None
    assigned: Assigned | None = None
    result: Result | None = None
    source: NodeImageSource | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def content(self) -> NodeImageSource:
        """Return where its image can be read now."""
        if self.source is None:
            raise InternalError(f"the image for {', '.join(self.platforms)} is not built yet")
        return self.source

    def success(self) -> Success:
        """Return how it worked."""
        if self.result is None:
            raise InternalError(f"the build for {', '.join(self.platforms)} has not ended")
        return self.result.success


class LegsBuild:
    """Does what a `BuildRun` does, with one build per group of platforms.

    Attributes:
        results: of the whole build.
    """

    def __init__(
        self,
        invocation: Invocation,
        options: BuildOptions,
        outputs: Sequence[OutputOption],
        files: ContextFiles,
        display: Display,
        connections: Connections,
        settings: Settings,
        private: PrivateInputs,
        *,
        groups: Sequence[tuple[str, ...]],
        results: Results,
        hold: Hold | None = None,
    ) -> None:
        """Prepare.

        Args:
            invocation: of the command.
            options: of the whole build.
            outputs: the effective ones.
            files: what is built; scanned once for all legs.
            display: shows all legs.
            connections: of the process.
            settings: which gateway and project.
            private: secrets and SSH agents.
            groups: platforms of each leg.
            results: of the whole build.
            hold: awaited when all legs have worked, while the image can still be read.

        Raises:
            InvalidValueError: several nodes cannot do together what is asked for.
        """
        check_legs(options, outputs)
        # Ctrl-C ends all of them: several cannot ask at one terminal.
        self._invocation = replace(invocation, interrupts=Interrupts())
        self._options = options
        self._outputs = outputs
        self._files = replace(files, sources=SharedContexts().share(files.sources))
        self._display = display
        self._connections = connections
        self._settings = settings
        self._private = private
        self._groups = groups
        self._hold = hold
        self._group_id = secrets.token_hex(8)
        self._legs: list[_Leg] = []
        self._last: _Leg | None = None
        self._done = asyncio.Event()
        self._response: dict[str, str] = {}
        self._image: JoinedImage | None = None
        self.results = results

    async def run(self, identity: StoredIdentity) -> tuple[Assigned, Result]:
        """Build all legs at once; the first that fails ends the others.

        Returns:
            Where the first one ran, and how all of them ended together.

        Raises:
            OffloadError: as `BuildRun.run`.
        """
        if warning := leg_warning(self._options):
            self._display.notice("warning", warning)
        directory = self._invocation.environment.get("TMPDIR")
        folder = await in_thread(
            lambda: Path(tempfile.mkdtemp(prefix="offload-legs-", dir=directory)),
            name="legs-directory",
        )
        try:
            return await self._run(identity, folder)
        finally:
            removing = in_thread(lambda: remove(folder), name="legs-directory")
            await finish(asyncio.wait((removing,)), CLOSE_SECONDS)

    async def _run(self, identity: StoredIdentity, folder: Path) -> tuple[Assigned, Result]:
        for number, platforms in enumerate(self._groups):
            place = folder / str(number)
            place.mkdir()
            self._legs.append(_Leg(platforms, place, LegDisplay(self._display, platforms)))
        try:
            async with asyncio.TaskGroup() as tasks:
                for leg in self._legs:
                    tasks.create_task(self._build(leg, identity), name=f"leg.{leg.folder.name}")
                joining = tasks.create_task(self._join(folder), name="legs.join")
        except BaseExceptionGroup as group:
            failed = _first_failure(group)
            if failed is not None:
                return failed.assigned, failed.result
            raise (find_offload_error(group) or group) from None
        first = self._legs[0].assigned
        if first is None:
            raise InternalError("a part of the build has run nowhere")
        return first, joining.result()

    async def _build(self, leg: _Leg, identity: StoredIdentity) -> None:
        options = leg_options(self._options, leg.platforms)
        tags = self._options.tags
        leg.build = BuildRun(
            self._invocation,
            options,
            leg_outputs(self._options, self._outputs, leg.platforms, leg.folder),
            self._files,
            leg.display,
            self._connections,
            self._settings,
            self._private,
            hold=lambda result, source: self._wait_for_others(leg, result, source),
            part=BuildPart(self._group_id, tags[0] if tags else ""),
        )
        assigned, result = await leg.build.run(identity)
        if result is None:
            raise BuildCanceledError("canceled")
        if result.HasField("failure"):
            failure = Failure()
            failure.CopyFrom(result.failure)
            failure.message = f"{', '.join(leg.platforms)}: {failure.message}"
            if failure.vertex:
                failure.vertex = leg.display.digest(failure.vertex)
            raise _LegFailedError(assigned, failure, result)
        leg.assigned = assigned

    async def _wait_for_others(self, leg: _Leg, result: Result, source: NodeImageSource) -> None:
        """Keep the image of a leg readable until all of them are joined."""
        leg.result, leg.source = result, source
        self._last = leg
        leg.ready.set()
        digest = result.success.image.digest
        others = (other.ready.is_set() for other in self._legs)
        if not digest and not all(others):
            # Nothing of it is needed any more; the index is pushed by the one that ends last.
            return
        while not self._done.is_set():
            try:
                async with asyncio.timeout(KEEP_SECONDS):
                    await self._done.wait()
            except TimeoutError:
                # A node sends a client away that fetches nothing for long.
                if digest:
                    await source.manifest(digest)

    async def _join(self, folder: Path) -> Result:
        for leg in self._legs:
            await leg.ready.wait()
            if leg.build is not None:
                self.results.adopt_warnings(leg.build.results)
        result = Result(success=Success(), stats=self._stats())
        for leg in reversed(self._legs):
            said = leg.success().exporter_response
            self._response |= {key: said[key] for key in said if not key.startswith("container")}
        if any(output.type == "image" for output in self._outputs):
            await self._join_image(result.success)
        for number, output in enumerate(self._outputs):
            if output.type in ARCHIVES:
                await self._join_archive(number, output, folder)
            elif output.type == "registry":
                await self._push(output)
        result.success.exporter_response.update(self._response)
        if self._image is not None:
            await self.results.deliver(result, self._image)
            if self._hold is not None:
                await self._hold(result, self._image)
        self._done.set()
        return result

    def _stats(self) -> BuildStats:
        """Return the numbers of all legs together; they have one context."""
        whole = BuildStats()
        for leg in self._legs:
            if leg.result is None:
                continue
            for name in BuildStats.DESCRIPTOR.fields_by_name:
                value, now = getattr(leg.result.stats, name), getattr(whole, name)
                same = name in ("context_files", "context_bytes")
                setattr(whole, name, max(value, now) if same else value + now)
        return whole

    async def _join_image(self, success: Success) -> None:
        parts = [(leg.success().image.digest, leg.content) for leg in self._legs]
        if not all(digest for digest, _ in parts):
            raise InternalError("a node has built no image")
        self._image = await join_images(parts, self._options.platforms)
        index = self._image.index
        success.image.CopyFrom(
            ImageDescriptor(
                digest=index.digest, media_type=index.media_type, size_bytes=len(index.raw)
            )
        )
        self._answer(index.descriptor(self._annotations()))

    async def _join_archive(self, number: int, output: OutputOption, folder: Path) -> None:
        parts = [archive(leg.folder, number) for leg in self._legs]
        whole = archive(folder, number)
        if output.type == "tar":
            await in_thread(lambda: join_trees(parts, whole), name="join-archives")
        else:
            platforms = self._options.platforms
            index = await in_thread(
                lambda: join_layouts(parts, whole, platforms), name="join-archives"
            )
            self._answer(index.descriptor(self._annotations()))
        await self.results.hand_over(number, whole)

    async def _push(self, output: OutputOption) -> None:
        leg = self._last
        if leg is None or leg.build is None:
            raise InternalError("a part of the build has run nowhere")
        names = push_names(self._options, output)
        with self._display.local_step(f"[offload] pushing the index of {names[0]}") as step:
            pushed = await push_index(
                leg.content(),
                leg.build.build_id,
                [one.success().exporter_response.get(DIGEST, "") for one in self._legs],
                names,
                platforms=self._options.platforms,
                insecure=parse_boolean(output.attributes.get(INSECURE, "")) is True,
                environment=self._invocation.environment,
            )
            step.log(f"{pushed.digest} for {', '.join(self._options.platforms)}")
        descriptor: dict[str, Any] = {
            "mediaType": pushed.media_type,
            "digest": pushed.digest,
            "size": pushed.size_bytes,
        }
        if annotations := self._annotations():
            descriptor["annotations"] = annotations
        self._answer(descriptor)

    def _annotations(self) -> dict[str, str]:
        """Return the annotations that the descriptors of all legs have."""
        found: dict[str, str] = {}
        for leg in self._legs:
            text = leg.success().exporter_response.get(DESCRIPTOR, "")
            try:
                said = json.loads(base64.b64decode(text)) if text else {}
            except ValueError:
                continue
            found |= said.get("annotations") or {}
        return found

    def _answer(self, descriptor: dict[str, Any]) -> None:
        """Note what there is now, in BuildKit's words; the last output counts."""
        self._response[DIGEST] = descriptor["digest"]
        self._response[DESCRIPTOR] = base64.b64encode(json.dumps(descriptor).encode()).decode()


def _first_failure(group: BaseExceptionGroup[BaseException]) -> _LegFailedError | None:
    for error in group.exceptions:
        if isinstance(error, _LegFailedError):
            return error
        if isinstance(error, BaseExceptionGroup):
            found = _first_failure(error)
            if found is not None:
                return found
    return None
