"""Build contexts to measure with: reproducible, and as compressible as what people build.

Text comes from a model: words by Zipf's law, phrases of them, and in each stretch of 4 KB some
phrases that return all the time, as the names in a source file do. On files of 5 KB zstd at level 1
makes it 2.8 times smaller file by file and 3.5 times smaller in batches of 1 MiB; for real source
code (Go, Python, JavaScript) the factors are 2.9 to 4 and 3.6 to 5.7. A *variant* of a tree has the
same paths and sizes and is as compressible, but has no content in common: its letters are exchanged
for others.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DOCKERFILE = "FROM scratch\nCOPY . /tree\n"
_PIECE = 1 << 22
_CORPUS_BYTES = 32_000_000
_FILES_PER_FOLDER = 12
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_MARKS = (" ", ".", " = ", "(", ", ", ")", "();\n    ", ":\n        ", ";\n", "\n\n", "[0]", "_")
_MARK_WEIGHTS = (20, 15, 8, 10, 10, 8, 6, 5, 6, 1, 2, 9)
_PHRASES = 40_000
_LOCAL_PHRASES = 80
_STRETCH_PHRASES = 600
_LOCAL_SHARE = 0.72


class Keystream:
    """Bytes that look random to everybody and are the same for the same seed: AES in CTR mode."""

    def __init__(self, seed: str) -> None:
        key = hashlib.sha256(seed.encode()).digest()
        self._encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        return self._encryptor.update(bytes(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """Return the next bytes in pieces."""
        for start in range(0, size, _PIECE):
            yield self.read(min(_PIECE, size - start))


class Text:
    """An endless text; one variant never says what another one says."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self._laps = 0
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        found = []
        while size:
            if not self._left:
                self._left = memoryview(_corpus().translate(self._alphabet()))
            part = self._left[:size]
            self._left = self._left[len(part) :]
            size -= len(part)
            found.append(bytes(part))
        return b"".join(found)

    def _alphabet(self) -> bytes:
        letters = list(_LETTERS)
        random.Random(f"{self._variant}/{self._laps}").shuffle(letters)
        self._laps += 1
        return bytes.maketrans(_LETTERS, bytes(letters))


def write_tree(
    folder: Path, *, files: int, size_bytes: int, variant: str, binary_every: int = 0
) -> Path:
    """Write a tree of text files with a Dockerfile that copies it.

    Args:
        folder: is made.
        files: how many.
        size_bytes: all files together.
        variant: decides what is in the files, not how many and how large they are.
        binary_every: each file of this number is incompressible; 0 for none.
    """
    text, noise = Text(variant), Keystream(variant)
    for number, size in enumerate(_sizes(files, size_bytes)):
        path = folder / _name(number)
        if number % _FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        binary = binary_every and number % binary_every == binary_every - 1
        path.write_bytes(noise.read(size) if binary else text.read(size))
    (folder / "Dockerfile").write_text(DOCKERFILE)
    return folder


def write_equal_files(
    folder: Path, *, files: int, file_bytes: int, variant: str, dockerfile: str = DOCKERFILE
) -> Path:
    """Write many small files of one size, each with other text, and a Dockerfile."""
    text = Text(variant)
    for number in range(files):
        path = folder / _name(number)
        if number % _FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        # The text returns in the end, but never with the same first line.
        head = f"# {number}\n".encode()
        path.write_bytes(head + text.read(file_bytes - len(head)))
    (folder / "Dockerfile").write_text(dockerfile)
    return folder


def write_noise(
    folder: Path, sizes: Mapping[str, int], *, variant: str, dockerfile: str = DOCKERFILE
) -> Path:
    """Write incompressible files of these names and sizes, and a Dockerfile."""
    folder.mkdir(parents=True)
    noise = Keystream(variant)
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            for piece in noise.pieces(size):
                file.write(piece)
    (folder / "Dockerfile").write_text(dockerfile)
    return folder


def change_middle(path: Path, data: bytes, *, insert: bool) -> None:
    """Put bytes into the middle of a file, in addition to what is there or over it."""
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        rest = file.read() if insert else b""
        file.seek(middle)
        file.write(data)
        file.write(rest)


def clone(tree: Path, target: Path, *, keep_times: bool) -> Path:
    """Copy a tree, as it is or with new modification times, as a checkout makes them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a" if keep_times else "-r", tree, target], check=True)
    return target


def _name(number: int) -> Path:
    folder = number // _FILES_PER_FOLDER
    name = f"m{number:06}.js"
    return Path(
        "packages", f"p{folder // 20:04}", "lib" if folder % 2 else "src", f"{folder}", name
    )


@cache
def _sizes(files: int, size_bytes: int) -> tuple[int, ...]:
    """Return sizes as source files have them (log-normal), with an exact sum."""
    generator = random.Random(files)
    raw = [generator.lognormvariate(0.0, 1.1) for _ in range(files)]
    scale = (size_bytes - 64 * files) / sum(raw)
    sizes = [64 + int(value * scale) for value in raw]
    sizes[0] += size_bytes - sum(sizes)
    return tuple(sizes)


@cache
def _corpus() -> bytes:
    generator = random.Random("corpus")
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(generator.choices(syllables, k=1 + number % 3)) for number in range(6000)]
    by_rank = list(itertools.accumulate(1 / (rank + 3) ** 0.9 for rank in range(len(words))))
    count = 2 * _PHRASES
    chosen = generator.choices(words, cum_weights=by_rank, k=count)
    marks = generator.choices(_MARKS, weights=_MARK_WEIGHTS, k=count)
    units = [word + mark for word, mark in zip(chosen, marks, strict=True)]
    phrases = [
        "".join(units[number : number + 1 + number % 3]) for number in range(0, count - 2, 2)
    ]
    weights = list(itertools.accumulate(1 / (rank + 5) ** 0.6 for rank in range(len(phrases))))
    local_count = int(_STRETCH_PHRASES * _LOCAL_SHARE)
    found, size = [], 0
    while size < _CORPUS_BYTES:
        local = generator.choices(phrases, cum_weights=weights, k=_LOCAL_PHRASES)
        stretch = generator.choices(local, k=local_count)
        stretch += generator.choices(phrases, cum_weights=weights, k=_STRETCH_PHRASES - local_count)
        generator.shuffle(stretch)
        found.append("".join(stretch))
        size += len(found[-1])
    return "".join(found).encode()
