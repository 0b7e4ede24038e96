"""The forms of a build context, each with its Dockerfile and ignore files.

Source: buildx's build/opt.go, loadInputs, and what BuildKit's frontend makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.build.dockerfile import (
    IGNORE_FILE,
    MAX_INLINE_BYTES,
    NAME,
    ignore_file,
    inline_dockerfile,
    inline_file,
    locate_dockerfile,
)
from offload_client.build.namedcontexts import NamedContexts, find_named_contexts
from offload_client.build.options import check_text
from offload_client.build.remotecontext import check_remote, is_http_url, remote_definition
from offload_client.build.standardinput import read_text
from offload_client.build.vcs import build_definition
from offload_client.context.emptysource import EmptySource
from offload_client.context.source import DirectorySource
from offload_core.contextnames import CONTEXT, DOCKERFILE
from offload_core.errors import ContextError, InvalidValueError
from offload_core.goglob import clean_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from offload_client.build.cacheoptions import OtherCache
    from offload_client.build.options import BuildOptions
    from offload_client.build.standardinput import StandardInput
    from offload_client.context.source import ContextSource
    from offload_client.context.tarsource import TarSource
    from offload_client.invocation import Invocation
    from offload_proto.v1.node_service_pb2 import InlineFile

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class ContextFiles:
    """The local sources of one build, and what it takes from elsewhere."""

    root: Path
    """Directory of the build context; where the command was started when there is none."""
    dockerfile_name: str
    """Name of the Dockerfile below its own directory, or its path in a remote context."""
    inline: list[InlineFile]
    """Dockerfile and ignore files with their content."""
    definition: str = ""
    """What tells this build apart from others of its project; see `build_definition`."""
    sources: Mapping[str, ContextSource] = field(default_factory=dict)
    """What the node may ask for, by local name; "dockerfile" is inline."""
    url: str = ""
    """Of a build context that the node fetches; empty for the source "context"."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Named contexts, as the node takes them."""
    cache_imports: Sequence[OtherCache] = ()
    """Caches to read beside the pool's, as the node takes them."""
    warnings: Sequence[str] = ()
    """Sentences for the user."""
    release: Callable[[], None] | None = None
    """Frees what is open."""

    def close(self) -> None:
        """Free what is open; harmless when done twice."""
        if self.release is not None:
            self.release()


class ContextFinder:
    """Reads the files of one build, by the form of its context."""

    def __init__(
        self,
        invocation: Invocation,
        options: BuildOptions,
        standard_input: StandardInput,
        index: Path | None,
    ) -> None:
        """Read nothing yet.

        Args:
            invocation: where the command was started.
            options: of the build.
            standard_input: of the command.
            index: the stat index of directories; None for none.
        """
        self._invocation = invocation
        self._given = options.file
        self._text = options.dockerfile_inline
        self._url = options.path
        self._contexts = options.contexts
        self._input = standard_input
        self._index = index

    def in_directory(self, root: Path) -> ContextFiles:
        """Take a directory of this machine."""
        named = self._named()
        source = DirectorySource(root, index_path=self._index)
        separate = self._separate_dockerfile()
        try:
            if separate is not None:
                inline, name = [separate], separate.path
                definition = build_definition(root, root / self._label())
            else:
                dockerfile = locate_dockerfile(self._invocation, root, self._given)
                inline, name = [inline_file(dockerfile, DOCKERFILE)], dockerfile.name
                beside = dockerfile.with_name(name + IGNORE_FILE)
                if beside.is_file():
                    inline.append(inline_file(beside, DOCKERFILE))
                definition = build_definition(root, dockerfile)
            inline += ignore_file(root, CONTEXT)
        except OSError as error:
            raise ContextError(
                f"unable to prepare context: cannot read {error.filename}: {error.strerror}"
            ) from error
        return ContextFiles(
            root,
            name,
            inline + named.inline,
            definition,
            {CONTEXT: source, **named.sources},
            named=named.values,
        )

    def remote(self) -> ContextFiles:
        """Take what the node fetches; a relative -f is a path in it."""
        url = check_remote(self._url, "the build context")
        named = self._named()
        given = check_text("--file", self._given)
        separate = self._separate_dockerfile()
        if separate is None and Path(given).is_absolute():
            path = locate_dockerfile(self._invocation, self._invocation.cwd, given)
            separate = inline_file(path, DOCKERFILE)
        name = separate.path if separate is not None else _path_inside(given or NAME)
        return ContextFiles(
            self._invocation.cwd,
            name,
            [*([separate] if separate is not None else []), *named.inline],
            remote_definition(url, self._label()),
            named.sources,
            url=url,
            named=named.values,
        )

    def on_standard_input(self) -> ContextFiles:
        """Take an archive, or a Dockerfile without a context."""
        if self._given == STANDARD_INPUT:
            raise InvalidValueError(
                "invalid argument: can't use stdin for both build context and dockerfile"
            )
        from offload_client.build.stdinspool import HEAD_BYTES, is_archive

        named = self._named()
        head = self._input.peek(HEAD_BYTES)
        if is_archive(head):
            return self._archive(named)
        if not head:
            raise ContextError(
                "standard input is empty; pipe a Dockerfile or a tar archive into the command"
            )
        if self._given:
            raise InvalidValueError(
                "ambiguous Dockerfile source: both stdin and flag correspond to Dockerfiles"
            )
        data = read_text(self._input, MAX_INLINE_BYTES)
        return self._without_directory(inline_dockerfile(data), named)

    def _archive(self, named: NamedContexts) -> ContextFiles:
        from offload_client.build.stdinspool import spool
        from offload_client.context.tarsource import TarSource

        directory = self._invocation.environment.get("TMPDIR")
        with spool(self._input, Path(directory) if directory else None) as file:
            source = TarSource(file.fileno())
        try:
            dockerfile = self._separate_dockerfile() or self._archived_dockerfile(source)
            return self._without_directory(dockerfile, named, source)
        except BaseException:
            source.close()
            raise

    def _archived_dockerfile(self, source: TarSource) -> InlineFile:
        path = _path_inside(check_text("--file", self._given) or NAME)
        data = source.read_file(path, MAX_INLINE_BYTES + 1)
        if data is None and path.rpartition("/")[2] == NAME:
            other = path.removesuffix(NAME) + NAME.lower()
            data = source.read_file(other, MAX_INLINE_BYTES + 1)
            path = path if data is None else other
        if data is None:
            raise ContextError(
                f"failed to read dockerfile: open {path}: no such file or directory (looked in the "
                "tar archive on standard input)",
                hint="give its path in the archive with -f",
            )
        if len(data) > MAX_INLINE_BYTES:
            raise ContextError(f"{path} in the tar archive has more than {MAX_INLINE_BYTES} bytes")
        return inline_dockerfile(data, path.rpartition("/")[2])

    def _without_directory(
        self, dockerfile: InlineFile, named: NamedContexts, source: TarSource | None = None
    ) -> ContextFiles:
        cwd = self._invocation.cwd
        sources = dict(named.sources)
        sources[CONTEXT] = EmptySource() if source is None else source
        return ContextFiles(
            cwd,
            dockerfile.path,
            [dockerfile, *named.inline],
            "\0".join((build_definition(cwd, cwd / self._label()), "stdin")),
            sources,
            named=named.values,
            release=source.close if source is not None else None,
        )

    def _named(self) -> NamedContexts:
        return find_named_contexts(self._invocation, self._contexts, self._index)

    def _separate_dockerfile(self) -> InlineFile | None:
        """Return a Dockerfile that is neither in the context nor a file of this machine."""
        if self._text is not None:
            return inline_dockerfile(check_text("the Dockerfile", self._text).encode())
        if self._given == STANDARD_INPUT:
            return inline_dockerfile(read_text(self._input, MAX_INLINE_BYTES))
        if is_http_url(self._given):
            from offload_client.build.dockerfileurl import fetch_dockerfile

            return inline_dockerfile(fetch_dockerfile(self._given, self._invocation.environment))
        return None

    def _label(self) -> str:
        """Return what -f says, the same for every build of the same Dockerfile."""
        given = self._given or NAME
        return given.partition("?")[0] if is_http_url(given) else given


def _path_inside(path: str) -> str:
    """Return a clean path below the root of a context.

    Raises:
        ContextError: it leads out of it.
    """
    clean = clean_path(path.lstrip("/"))
    if clean == "." or clean == ".." or clean.startswith("../"):
        raise ContextError(
            f'failed to read dockerfile: "{path}" is not a path inside the build context'
        )
    return clean
