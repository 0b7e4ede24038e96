"""What the launcher of an engine is told, and what it says."""

from __future__ import annotations

from typing import TypedDict


class Plan(TypedDict):
    """Of one start; the first line that the launcher reads.

    Attributes:
        id_base: user and group of this machine that are root in the engine.
        id_count: how many follow.
        users: path of the user namespace of an earlier start; empty for a new one.
        root: directory for the engine's root file system.
        disk: file with its ext4 file system.
        binds: files and directories of the machine that are seen in the engine, read only.
        links: path in the engine and target of symbolic links.
        programs: programs that lie outside of these, and where the engine has them.
        nodes: device nodes: path, "c" or "b", major, minor.
        device_files: files and directories that devices need.
        files: path in the engine and text.
        groups: name in the engine and directory of control groups.
        group_links: further names of those.
        unified: the control groups are of version 2 only.
        listener: descriptor of the socket of the engine's API.
        hostname: of the engine.
        command: the engine, with its arguments.
    """

    id_base: int
    id_count: int
    users: str
    root: str
    disk: str
    binds: list[str]
    links: list[tuple[str, str]]
    programs: list[tuple[str, str]]
    nodes: list[tuple[str, str, int, int]]
    device_files: list[str]
    files: list[tuple[str, str]]
    groups: list[tuple[str, str]]
    group_links: list[tuple[str, str]]
    unified: bool
    listener: int
    hostname: str
    command: list[str]


class NetworkPlan(TypedDict):
    """The second line that the launcher reads, when it has said what its users are.

    Attributes:
        namespace: path of the network namespace.
        files: path in the engine and text, of what depends on the network.
    """

    namespace: str
    files: list[tuple[str, str]]
