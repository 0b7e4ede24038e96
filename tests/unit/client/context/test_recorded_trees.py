"""Scans of trees give the entries that fsutil's sender announced, request by request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offload_client.context.entries import TreeEntry, tree_entries
from offload_client.context.followpaths import follow_links
from offload_client.context.scan import scan_context
from offload_core.errors import ContextError
from offload_core.filemode import MODE_SYMLINK, is_regular


def _build(root: Path, nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        path = root / node["path"]
        match node["kind"]:
            case "dir":
                path.mkdir()
            case "file":
                path.write_bytes(bytes(node.get("size", 0)))
            case "link":
                path.hardlink_to(root / node["target"])
                continue
            case "symlink":
                path.symlink_to(node["target"])
                continue
            case "fifo":
                os.mkfifo(path)
        path.chmod(node["mode"])


def _as_fsutil(entries: list[TreeEntry]) -> list[tuple[str, int, int, str]]:
    """Add the sizes that fsutil gives to links, and that follow from the link itself."""
    sizes = {entry.path: entry.size_bytes for entry in entries}
    rows = []
    for entry in entries:
        size = entry.size_bytes
        if entry.mode & MODE_SYMLINK:
            size = len(os.fsencode(entry.link_name))
        elif entry.link_name and is_regular(entry.mode):
            size = sizes[entry.link_name]
        rows.append((entry.path, entry.mode, size, entry.link_name))
    return rows


def _scan(root: Path, row: dict[str, Any]) -> list[tuple[str, int, int, str]] | str:
    try:
        found = scan_context(
            root,
            include=row.get("include") or (),
            exclude=row.get("exclude") or (),
            follow=row.get("follow") or (),
            normalise_modes=False,
            warn=_no_warning,
        )
        entries = list(tree_entries(found))
    except ContextError:
        return "failed"
    return _as_fsutil(entries)


def _no_warning(text: str) -> None:
    raise AssertionError(text)


def test_every_recorded_scan_lists_fsutils_entries(corpus: dict[str, Any], tmp_path: Path) -> None:
    wrong = []
    root = tmp_path
    for number, row in enumerate(corpus["trees"]):
        if not row.get("same_tree"):
            root = tmp_path / str(number)
            root.mkdir()
            _build(root, row["tree"])
        if row.get("follow"):
            followed = follow_links(str(root), row["follow"])
            if followed != row["followed"]:
                wrong.append((row, followed))
        expected: object = "failed"
        if not row.get("failed"):
            expected = [
                (entry["path"], entry["mode"], entry.get("size", 0), entry.get("link", ""))
                for entry in row.get("entries") or []
            ]
        got = _scan(root, row)
        if got != expected:
            wrong.append((row, got))
    assert not wrong, f"{len(wrong)} differ; the first: {wrong[0]}"
    assert len(corpus["trees"]) > 1000
