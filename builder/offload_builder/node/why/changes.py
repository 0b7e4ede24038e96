"""What differs between two builds: instructions, arguments, files. Pure."""

from __future__ import annotations

import fnmatch
import posixpath
import re
import shlex
from typing import TYPE_CHECKING

from offload_core.listing import decode_page

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_builder.node.why.dockerfiletext import Instruction, Stage

_MAX_SHOWN = 120
_MOUNT = re.compile(r"--mount=(\S+)")


def first_difference(now: Sequence[Instruction], before: Sequence[Instruction]) -> str:
    """Return where two runs of instructions part, as a sentence's end; empty when they do not."""
    for one, other in zip(now, before, strict=False):
        if one != other:
            return f"{_short(other.text)} -> {_short(one.text)}"
    if len(now) > len(before):
        return f"{_short(now[len(before)].text)} is new"
    if len(now) < len(before):
        return f"{_short(before[len(now)].text)} is gone"
    return ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 1] + "…"


def changed_arguments(
    now: Mapping[str, str],
    before: Mapping[str, str],
    declared: Iterable[Instruction],
) -> list[str]:
    """Return the names of arguments whose values differ and that the instructions declare."""
    names = {
        part.partition("=")[0]
        for instruction in declared
        if instruction.keyword == "ARG"
        for part in instruction.text.split()[1:]
    }
    return sorted(name for name in names if now.get(name) != before.get(name))


def changed_paths(now: Mapping[str, bytes], before: Mapping[str, bytes]) -> dict[str, str]:
    """Return what happened to each path that differs: "changed", "added" or "removed"."""
    found = {}
    for path in sorted(now.keys() | before.keys()):
        if path not in before:
            found[path] = "added"
        elif path not in now:
            found[path] = "removed"
        elif now[path] != before[path]:
            found[path] = "changed"
    return found


def page_entries(data: bytes) -> dict[str, bytes]:
    """Return for each path of a page what makes it differ: mode, size, digest, link.

    Raises:
        UsageError: this is no page.
    """
    page = decode_page(data)
    digests = page.digest_list()
    return {
        path: b"%d %d %s %s"
        % (
            page.modes[number],
            page.sizes_bytes[number],
            digests[number],
            page.links.get(number, "").encode(),
        )
        for number, path in enumerate(page.paths)
    }


def sources_of(instruction: Instruction) -> dict[str, list[str]]:
    """Return which local sources an instruction reads, and which paths of them.

    Returns:
        By name of the source ("context", a stage or a named context) patterns of paths, of which
        "" means everything.
    """
    if instruction.keyword == "RUN":
        return _bound(instruction.text)
    if instruction.keyword not in ("COPY", "ADD"):
        return {}
    try:
        words = shlex.split(instruction.text.partition("\n")[0])[1:]
    except ValueError:
        return {"context": [""]}
    name = "context"
    while words and words[0].startswith("--"):
        flag, _, value = words.pop(0).partition("=")
        if flag == "--from":
            name = value
    if words and words[0].startswith("["):
        words = [word.strip("[],") for word in words]
    return {name: [_clean(path) for path in words[:-1] if "://" not in path]}


def _bound(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for options in _MOUNT.findall(text):
        pairs = (part.partition("=") for part in options.split(","))
        values: dict[str, str] = {key: value for key, _, value in pairs}
        if values.get("type", "bind") == "bind":
            path = values.get("source", values.get("src", ""))
            found.setdefault(values.get("from", "context"), []).append(_clean(path))
    return found


def _clean(path: str) -> str:
    clean = posixpath.normpath("/" + path).lstrip("/")
    return "" if clean == "." else clean


def touches(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a path is one of those that `sources_of` names, or lies below one."""
    parts = path.split("/")
    for pattern in patterns:
        if not pattern:
            return True
        depth = pattern.count("/") + 1
        if fnmatch.fnmatchcase("/".join(parts[:depth]), pattern):
            return True
    return False


def same_stage(stages: Sequence[Stage], stage: Stage) -> Stage | None:
    """Return the stage of another Dockerfile that has the name of this one."""
    return next((other for other in stages if other.name == stage.name), None)
