"""The process that reads or writes the files of one mount (`python -m`, started by `workerlink`).

The files were made by steps of builds, so nothing in them is to be trusted: before the first look
at one, the process makes the mount its root directory, and no link leads out of it. It also keeps
the work of many small files away from the node's event loop.

Orders are lines of JSON on standard input, answers are frames on standard output: the length of a
JSON head and of a body (4 bytes each, big-endian), the head, the body.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

from offload_builder.node.mounts.packing import ChangedError, Index, Packer, TooLargeError
from offload_builder.node.mounts.tree import Tree
from offload_builder.node.mounts.unpacking import Unpacker, clear_leftovers

HEADER = struct.Struct(">II")


@dataclass
class Worker:
    """One order after the other, about one mount."""

    orders: BinaryIO
    answers: BinaryIO
    index_file: int = -1
    """Open for reading and writing; -1 for none."""
    blobs: int = -1
    """Directory of the node's blobs."""
    id_base: int = 0
    """User and group that are number 0 in what is stored."""

    def run(self) -> None:
        """Serve until the orders end."""
        first = self._order()
        if first is None:
            return
        try:
            self._enter(first)
            if first["do"] == "pack":
                self._pack(int(first["max_bytes"]))
            elif first["do"] == "unpack":
                self._unpack(first)
            elif first["do"] == "clear":
                clear_leftovers()
                self._answer({"done": True})
        except TooLargeError as error:
            self._answer({"error": str(error), "reason": "too-large"})
        except ChangedError as error:
            self._answer({"error": f"{error} changed meanwhile", "reason": "changed"})
        except (OSError, ValueError, KeyError, RecursionError, MemoryError) as error:
            self._answer({"error": f"{type(error).__name__}: {error}", "reason": "failed"})

    def _order(self) -> dict[str, Any] | None:
        line = self.orders.readline()
        if not line:
            return None
        order: dict[str, Any] = json.loads(line)
        return order

    def _answer(self, head: dict[str, Any], body: bytes = b"") -> None:
        encoded = json.dumps(head).encode()
        self.answers.write(HEADER.pack(len(encoded), len(body)) + encoded)
        self.answers.write(body)
        self.answers.flush()

    def _enter(self, order: dict[str, Any]) -> None:
        if index := order.get("index"):
            self.index_file = os.open(index, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if blobs := order.get("blobs"):
            self.blobs = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.id_base = int(order.get("id_base", 0))
        if nice := int(order.get("nice", 0)):
            os.nice(nice)
        os.chdir(order["root"])
        os.chroot(".")

    def _read_index(self) -> Index:
        if self.index_file < 0:
            return Index()
        with os.fdopen(os.dup(self.index_file), "rb") as file:
            return Index.decode(file.read())

    def _write_index(self, index: Index) -> None:
        if self.index_file >= 0:
            with os.fdopen(os.dup(self.index_file), "wb") as file:
                file.seek(0)
                file.truncate()
                file.write(index.encode())

    def _pack(self, max_bytes: int) -> None:
        packer = Packer(
            self._read_index(),
            max_bytes,
            lambda digest, blob: self._answer({"piece": digest}, blob),
        )
        packer.run()
        tree = packer.tree
        if self.id_base:
            tree.shift_owners(-self.id_base)
        self._answer(
            {
                "tree": True,
                "pieces": [[piece.digest, piece.size_bytes] for piece in tree.pieces],
                "files": len(tree.entries),
                "content_bytes": packer.content_bytes,
            },
            tree.encode(),
        )
        # The new index is good only when its pieces are kept; the node says so.
        order = self._order()
        if order is not None and order.get("do") == "keep":
            self._write_index(packer.index)
            self._answer({"done": True})

    def _blob(self, path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.blobs)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def _unpack(self, first: dict[str, Any]) -> None:
        tree = Tree.decode(self._blob(first["tree"]))
        if self.id_base:
            tree.shift_owners(self.id_base)
        clear_leftovers()
        unpacker = Unpacker(tree, str(first["name"]))
        self._answer({"pieces": [[piece.digest, piece.size_bytes] for piece in tree.pieces]})
        while (order := self._order()) is not None:
            if order["do"] == "add":
                number = int(order["piece"])
                unpacker.add(number, self._blob(order["path"]))
                self._answer({"added": number})
            elif order["do"] == "complete":
                unpacker.complete()
                self._answer({"done": True})
            elif order["do"] == "place":
                unpacker.place()
                self._write_index(unpacker.index())
                self._answer({"done": True})
                return


def main() -> None:
    """Run the worker on its standard streams."""
    Worker(sys.stdin.buffer, sys.stdout.buffer).run()


if __name__ == "__main__":
    main()
