"""Does what was decided on one side, while that side still is as it was believed to be.

Runs in the thread of the replica. Large files are put together in a file beside their place,
piece by piece in any order; pieces that the former version has are taken from there.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from offload_core.chunklist import decode_chunks, is_chunked
from offload_core.errors import UsageError
from offload_core.filedigest import read_at
from offload_core.treesync.content import Part
from offload_core.treesync.entries import ABSENT, OTHER, Entry
from offload_core.treesync.tree import MeanwhileError, Stamp
from offload_proto.v1.session_sync_service_pb2 import (
    SYNC_KIND_DIRECTORY,
    SYNC_KIND_FILE,
    SYNC_KIND_LINK,
    SYNC_OUTCOME_CHANGED,
    SYNC_OUTCOME_DONE,
    SYNC_OUTCOME_FAILED,
    SYNC_OUTCOME_FULL,
    SYNC_OUTCOME_STALE,
    SyncOutcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from offload_core.treesync.decisions import Operation
    from offload_core.treesync.replica import Replica

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MEANWHILE = (MeanwhileError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Result(NamedTuple):
    """What became of an operation.

    Attributes:
        now: what is at its path.
        outcome: of it.
        reason: why it failed, in a few words.
    """

    now: Entry
    outcome: SyncOutcome.ValueType
    reason: str = ""


@dataclass(slots=True)
class _Assembly:
    """A large file that is being put together."""

    fd: int
    temporary: str
    places: dict[bytes, list[int]] = field(default_factory=dict)
    """Where pieces that have not come yet belong."""


@dataclass
class Applying:
    """Operations that were asked for together.

    Attributes:
        results: one for each; None while it waits for content.
        wants: content that is to be asked for, in order.
    """

    replica: Replica
    operations: Sequence[Operation]
    in_place: bool = False
    results: list[Result | None] = field(default_factory=list)
    wants: deque[Part] = field(default_factory=deque)
    _waiting: dict[bytes, list[int]] = field(default_factory=dict)
    _assemblies: dict[int, _Assembly] = field(default_factory=dict)
    _paths: dict[bytes, str] | None = None

    @property
    def done(self) -> bool:
        """Whether every operation has its result."""
        return None not in self.results

    def begin(self) -> None:
        """Do what needs no content."""
        self.results = [None] * len(self.operations)
        for number in range(len(self.operations)):
            self._attempt(number, partial(self._start, number))

    def contents(self, found: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Use content that has come, by digest; None for what cannot be had."""
        for sha256, data in found:
            self._content(sha256, data)

    def _content(self, sha256: bytes, data: bytes | None) -> None:
        for number in self._waiting.pop(sha256, []):
            if self.results[number] is not None:
                continue
            if data is None:
                self._give_up(number, Result(self._now(number), SYNC_OUTCOME_STALE))
                continue
            self._attempt(number, partial(self._use, number, sha256, data))

    def abandon(self) -> None:
        """Remove what was begun; for a connection that is lost."""
        for assembly in self._assemblies.values():
            os.close(assembly.fd)
            self.replica.tree.discard(assembly.temporary)
        self._assemblies.clear()

    # One operation.

    def _attempt(self, number: int, action: Callable[[], Result | None]) -> None:
        path = self.operations[number].path
        try:
            self.results[number] = action()
        except _MEANWHILE:
            self.replica.look(path, force=True)
            self._give_up(number, Result(self._now(number), SYNC_OUTCOME_CHANGED))
        except UsageError as error:
            self._give_up(number, Result(self._now(number), SYNC_OUTCOME_FAILED, error.message))
        except OSError as error:
            full = error.errno in _FULL
            outcome = SYNC_OUTCOME_FULL if full else SYNC_OUTCOME_FAILED
            reason = error.strerror or "it failed"
            self._give_up(number, Result(self._now(number), outcome, reason))

    def _now(self, number: int) -> Entry:
        return self.replica.entry(self.operations[number].path)

    def _give_up(self, number: int, result: Result) -> None:
        assembly = self._assemblies.pop(number, None)
        if assembly is not None:
            os.close(assembly.fd)
            self.replica.tree.discard(assembly.temporary)
        self.results[number] = result

    def _start(self, number: int) -> Result | None:
        path, wanted, expected, aside = self.operations[number]
        replica = self.replica
        if not replica.allowed(path, is_directory=wanted.is_directory):
            return Result(ABSENT, SYNC_OUTCOME_FAILED, "it is not synchronised")
        now = replica.look(path, force=True)
        if now != expected:
            done = now == wanted and not aside
            return Result(now, SYNC_OUTCOME_DONE if done else SYNC_OUTCOME_CHANGED)
        if aside:
            new = replica.tree.set_aside(path, aside)
            replica.look(path)
            replica.look(new, force=True)
            return Result(replica.entry(path), SYNC_OUTCOME_DONE)
        if wanted == ABSENT:
            self._remove(path, now)
        elif wanted.kind == SYNC_KIND_DIRECTORY:
            self._make_directory(path, wanted, now)
        elif wanted.kind == SYNC_KIND_LINK:
            temporary = replica.tree.new_link(path, wanted.target)
            self._place(temporary, path, now)
            replica.look(path)
        elif wanted.kind == SYNC_KIND_FILE:
            return self._start_file(number, path, wanted, now)
        else:
            return Result(now, SYNC_OUTCOME_FAILED, "it cannot be made")
        return Result(replica.entry(path), SYNC_OUTCOME_DONE)

    def _remove(self, path: str, now: Entry) -> None:
        replica = self.replica
        if now.is_directory:
            replica.tree.remove_directory(path)
        else:
            self._note_kept(replica.tree.remove(path, self._stamp(path)))
        replica.look(path, force=True)

    def _make_directory(self, path: str, wanted: Entry, now: Entry) -> None:
        replica = self.replica
        if now.is_directory:
            replica.tree.set_status(path, wanted.mode, None)
        else:
            self._place(replica.tree.new_directory(path, wanted.mode), path, now)
        replica.look(path)

    def _start_file(self, number: int, path: str, wanted: Entry, now: Entry) -> Result | None:
        replica = self.replica
        if now.is_file and now.same_content(wanted):
            replica.tree.set_status(path, wanted.mode, wanted.modified_at_ns)
            status = replica.tree.status(path)
            if status is not None and status.st_size == now.size_bytes:
                replica.note_written(path, wanted, status)
            return Result(replica.entry(path), SYNC_OUTCOME_DONE)
        # Before the first byte is written: a chunk list can name one piece a million times.
        replica.check_room(wanted.size_bytes - now.size_bytes)
        if not wanted.size_bytes:
            return self._finish_small(number, b"")
        if is_chunked(wanted.size_bytes):
            fd, temporary = replica.tree.new_file(path)
            self._assemblies[number] = _Assembly(fd, temporary)
            known = replica.known_chunk_list(wanted.sha256)
            if known is not None:
                return self._learn_pieces(number, known)
            self._want(number, Part(wanted.sha256, 0, path))
            return None
        data = self._here(wanted)
        if data is not None:
            return self._finish_small(number, data)
        self._want(number, Part(wanted.sha256, wanted.size_bytes, path))
        return None

    def _want(self, number: int, part: Part) -> None:
        waiting = self._waiting.get(part.sha256)
        if waiting is None:
            self._waiting[part.sha256] = [number]
            self.wants.append(part)
        elif number not in waiting:
            waiting.append(number)

    def _here(self, wanted: Entry) -> bytes | None:
        """Return content that another file of this side has: most renames are found so."""
        if self._paths is None:
            self._paths = {
                entry.sha256: path
                for path, entry in self.replica.entries.items()
                if entry.is_file and not is_chunked(entry.size_bytes)
            }
        path = self._paths.get(wanted.sha256)
        if path is None:
            return None
        return self._read(path, 0, wanted.size_bytes, wanted.sha256)

    def _read(self, path: str, offset: int, size: int, sha256: bytes) -> bytes | None:
        try:
            fd = self.replica.tree.open_file(path)
            try:
                data = read_at(fd, offset, size)
            finally:
                os.close(fd)
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == sha256 else None

    # Content.

    def _use(self, number: int, sha256: bytes, data: bytes) -> Result | None:
        wanted = self.operations[number].wanted
        assembly = self._assemblies.get(number)
        if assembly is None:
            if len(data) != wanted.size_bytes:
                raise UsageError("its content has another size")
            return self._finish_small(number, data)
        if sha256 == wanted.sha256 and not assembly.places:
            return self._learn_pieces(number, data)
        for offset in assembly.places.pop(sha256, ()):
            _write_at(assembly.fd, offset, data)
        return self._finish_large(number) if not assembly.places else None

    def _learn_pieces(self, number: int, chunk_list: bytes) -> Result | None:
        path, wanted, now, _ = self.operations[number]
        assembly = self._assemblies[number]
        pieces = decode_chunks(chunk_list, wanted.size_bytes)
        self.replica.keep_chunk_list(wanted.sha256, chunk_list)
        os.ftruncate(assembly.fd, wanted.size_bytes)
        former = self._pieces_here(now)
        offset = 0
        for sha256, size in pieces:
            if sha256 in assembly.places:
                assembly.places[sha256].append(offset)
            else:
                at = former.get(sha256)
                data = self._read(path, at, size, sha256) if at is not None else None
                if data is not None:
                    _write_at(assembly.fd, offset, data)
                else:
                    assembly.places[sha256] = [offset]
                    self._want(number, Part(sha256, size, path, offset))
            offset += size
        return self._finish_large(number) if not assembly.places else None

    def _pieces_here(self, now: Entry) -> dict[bytes, int]:
        if not now.is_file or not is_chunked(now.size_bytes):
            return {}
        data = self.replica.known_chunk_list(now.sha256)
        if data is None:
            return {}
        found: dict[bytes, int] = {}
        offset = 0
        for sha256, size in decode_chunks(data, now.size_bytes):
            found[sha256] = offset
            offset += size
        return found

    def _finish_small(self, number: int, data: bytes) -> Result:
        path = self.operations[number].path
        fd, temporary = self.replica.tree.new_file(path)
        try:
            _write_at(fd, 0, data)
            return self._finish(number, fd, temporary)
        except BaseException:
            self.replica.tree.discard(temporary)
            raise
        finally:
            os.close(fd)

    def _finish_large(self, number: int) -> Result:
        assembly = self._assemblies.pop(number)
        try:
            return self._finish(number, assembly.fd, assembly.temporary)
        except BaseException:
            self.replica.tree.discard(assembly.temporary)
            raise
        finally:
            os.close(assembly.fd)

    def _finish(self, number: int, fd: int, temporary: str) -> Result:
        path, wanted, expected, _ = self.operations[number]
        replica = self.replica
        tree = replica.tree
        now = replica.look(path, force=True)
        if now != expected:
            tree.discard(temporary)
            return Result(now, SYNC_OUTCOME_CHANGED)
        if self.in_place and now.is_file:
            tree.overwrite(path, fd, wanted.mode, wanted.modified_at_ns)
            tree.discard(temporary)
            replica.look(path, force=True)
            return Result(replica.entry(path), SYNC_OUTCOME_DONE)
        tree.complete(fd, wanted.mode, wanted.modified_at_ns)
        inode = os.fstat(fd).st_ino
        self._place(temporary, path, now)
        status = tree.status(path)
        if (
            status is not None
            and status.st_ino == inode
            and status.st_size == wanted.size_bytes
            and status.st_mtime_ns == wanted.modified_at_ns
        ):
            replica.note_written(path, wanted, status)
        else:
            # Somebody writes it already, or the file system keeps times less exactly.
            replica.look(path, force=True)
        return Result(replica.entry(path), SYNC_OUTCOME_DONE)

    def _place(self, temporary: str, path: str, now: Entry) -> None:
        if now == OTHER:
            raise MeanwhileError
        before = None if now == ABSENT else self._stamp(path)
        try:
            self._note_kept(self.replica.tree.place(temporary, path, before))
        except BaseException:
            self.replica.tree.discard(temporary)
            raise

    def _stamp(self, path: str) -> Stamp:
        """Return the stamp of what was looked at; directories are never compared by it."""
        return self.replica.stamp(path) or Stamp(0, 0, 0, 0, 0)

    def _note_kept(self, path: str) -> None:
        if path:
            self.replica.kept.append(path)
            self.replica.look(path, force=True)


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
