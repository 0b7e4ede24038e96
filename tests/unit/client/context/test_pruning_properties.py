"""Skipping directories never changes what is listed, and the order is BuildKit's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload_client.context.entries import tree_entries
from offload_client.context.scan import scan_context
from offload_core.filemode import MODE_DIR
from offload_core.patterns import PatternMatcher

NAMES = ["a", "b", "ab", "a.b", "a-b", "a b", "é", "z"]
ELEMENTS = [*NAMES, "*", "?", "a*", "*b", "**", "[ab]", "**b", "a{0}", "a|b", "[^a]"]

trees = st.lists(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join), min_size=1, max_size=14
)
patterns = st.lists(
    st.tuples(
        st.booleans(), st.lists(st.sampled_from(ELEMENTS), min_size=1, max_size=4).map("/".join)
    ).map(lambda parts: ("!" if parts[0] else "") + parts[1]),
    max_size=4,
)


def _make_tree(root: Path, files: list[str]) -> None:
    for name in files:
        path = root / name
        if any(parent.is_file() for parent in path.parents) or path.is_dir():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def _component_key(path: str) -> list[bytes]:
    return [part.encode() for part in path.split("/")]


def _scan(root: Path, include: list[str], exclude: list[str]) -> list[tuple[str, int]]:
    found = scan_context(root, include=include, exclude=exclude, warn=lambda _: None)
    return [(entry.path, entry.mode) for entry in tree_entries(found)]


def _filtered(root: Path, include: list[str], exclude: list[str]) -> list[str]:
    """Judge every path of the full walk, then add the parents of what is wanted."""
    including = PatternMatcher(include) if include else None
    excluding = PatternMatcher(exclude) if exclude else None
    states: dict[str, tuple[int, int]] = {"": (0, 0)}
    wanted: set[str] = set()
    for path, _ in _scan(root, [], []):
        parent = path.rpartition("/")[0]
        include_state, exclude_state = states[parent]
        take, drop = True, False
        if including:
            take, include_state = including.match_child(path, include_state)
        if excluding:
            drop, exclude_state = excluding.match_child(path, exclude_state)
        states[path] = include_state, exclude_state
        if take and not drop:
            wanted.add(path)
            while parent:
                wanted.add(parent)
                parent = parent.rpartition("/")[0]
    return sorted(wanted, key=_component_key)


def _in_fsutils_shortcut(pattern: str) -> bool:
    """Name the forms that fsutil takes for plain paths, and so skips directories that they reach.

    The recorded trees have these cases; a scan must list what fsutil lists, not what is right.
    """
    glob_end = pattern.endswith(("/*", "/**"))
    return pattern.endswith("/*/**") or (glob_end and ("|" in pattern or "{" in pattern))


@settings(max_examples=250, deadline=None)
@given(trees, patterns, patterns)
def test_pruned_walk_equals_filtered_full_walk(
    files: list[str], include: list[str], exclude: list[str]
) -> None:
    assume(not any(map(_in_fsutils_shortcut, include + exclude)))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _make_tree(root, files)
        found = [path for path, _ in _scan(root, include, exclude)]
        assert found == _filtered(root, include, exclude)


@settings(max_examples=100, deadline=None)
@given(trees, patterns)
def test_order_is_buildkits_and_parents_come_first(files: list[str], exclude: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _make_tree(root, files)
        found = _scan(root, [], exclude)
        paths = [path for path, _ in found]
        assert paths == sorted(paths, key=_component_key)
        # fsutil's own way to put it: byte by byte, with "/" before everything else.
        assert paths == sorted(paths, key=lambda path: path.encode().replace(b"/", b"\0"))
        announced = {""} | {path for path, mode in found if mode & MODE_DIR}
        assert all(path.rpartition("/")[0] in announced for path in paths)
        assert len(set(paths)) == len(paths)


def test_excluded_directory_is_not_opened_without_a_matching_exception(tmp_path: Path) -> None:
    matcher = PatternMatcher(["node_modules", "vendor", "!vendor/*/keep", "!docs/a?/x"])
    assert matcher.prunable("node_modules", True)
    assert matcher.prunable("vendor/a/b", True)
    assert not matcher.prunable("vendor", True)
    assert not matcher.prunable("vendor/a", True)
    assert not matcher.prunable("docs/ab", True)
    assert matcher.prunable("docs/b", True)


def test_exception_that_crosses_directories_keeps_all_of_them_open() -> None:
    matcher = PatternMatcher(["node_modules", "!**/keep"])
    assert not matcher.prunable("node_modules/a/b", True)
