"""BUILDX_GIT_LABELS: labels that say which commit an image was built from.

Source: docker/buildx build/git.go and util/gitutil.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from offload_client.bytepipe import in_thread
from offload_client.goboolean import parse_boolean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation

LABELS = "BUILDX_GIT_LABELS"
CHECK_DIRTY = "BUILDX_GIT_CHECK_DIRTY"
REVISION = "org.opencontainers.image.revision"
SOURCE = "org.opencontainers.image.source"
ENTRYPOINT = "com.docker.image.source.entrypoint"
GIT_SECONDS = 30.0
"""For one command; looking for changes reads the whole tree."""


async def with_git_labels(
    invocation: Invocation, options: BuildOptions, warn: Callable[[str], None]
) -> BuildOptions:
    """Return the options of a build with the labels that the environment asks for.

    As in buildx they take the place of labels of the same name, and a repository that cannot be
    read is no error.

    Args:
        invocation: where the command was started, with its environment.
        options: of the build.
        warn: told when nothing could be read.
    """
    text = invocation.environment.get(LABELS, "")
    folder = invocation.path(options.path)
    if not (text == "full" or parse_boolean(text)) or not folder.is_dir():
        return options
    dockerfile = invocation.path(options.file) if options.file else folder / "Dockerfile"
    dirty = parse_boolean(invocation.environment.get(CHECK_DIRTY, "")) is True
    repository = _Repository(folder, invocation.environment)
    try:
        labels = await in_thread(
            lambda: repository.labels(dockerfile, check_dirty=dirty), name="git-labels"
        )
    except (OSError, subprocess.SubprocessError) as error:
        if (folder / ".git").exists():
            warn(f"current commit information was not captured by the build: {error}")
        return options
    return replace(options, labels={**options.labels, **labels})


class _Repository:
    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = {**environment, "LC_ALL": "C"}

    def labels(self, dockerfile: Path, *, check_dirty: bool) -> dict[str, str]:
        """Return the labels; blocking.

        Raises:
            OSError: git cannot be run.
            subprocess.SubprocessError: this is no repository.
        """
        root = self._run("rev-parse", "--show-toplevel")
        found: dict[str, str] = {}
        if revision := self._try("rev-parse", "--verify", "--quiet", "HEAD^{commit}"):
            changed = check_dirty and self._is_dirty()
            found[REVISION] = f"{revision}-dirty" if changed else revision
        if source := self._remote():
            found[SOURCE] = _without_login(source)
        below = os.path.relpath(dockerfile.resolve(), os.path.realpath(root))
        if not below.startswith(".."):
            found[ENTRYPOINT] = below
        return found

    def _is_dirty(self) -> bool:
        try:
            return bool(self._run("status", "--porcelain", "--ignored"))
        except subprocess.SubprocessError:
            return True

    def _remote(self) -> str:
        branch = self._try("symbolic-ref", "-q", "HEAD")
        own = self._try("for-each-ref", "--format=%(upstream:remotename)", branch) if branch else ""
        urls = (
            self._try("remote", "get-url", name) for name in (own, "origin", "upstream") if name
        )
        return next(filter(None, urls), "")

    def _try(self, *words: str) -> str:
        try:
            return self._run(*words)
        except subprocess.CalledProcessError:
            return ""

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "log.showSignature=false", *words],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
        )
        return done.stdout.decode("utf-8", "replace").partition("\n")[0]


def _without_login(url: str) -> str:
    """Return a URL without user and password; what is no URL, such as git@host:path, as it is."""
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
