"""The policy that a single build brings, which only takes away."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import Layer, Policy
from offload_builder.egress.policy.reading import read_text
from offload_core.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from offload_proto.v1.builds_service_pb2 import NetworkPolicy

MAX_BYTES = 64 << 10
"""Of its text; it travels with every build, and is kept while the build waits or runs."""
MAX_FILE_NAME = 200
_KEY_DIGITS = 32


@dataclass(frozen=True)
class BuildPolicy:
    """A policy that builds bring; two are the same when their keys are.

    Attributes:
        key: hexadecimal digits that follow from the name of its file and its text.
        policy: what it says.
    """

    key: str
    policy: Policy = field(compare=False, repr=False)


def read_build_policy(message: NetworkPolicy, *, admitted: bool = False) -> BuildPolicy:
    """Return the policy of a build. Blocks for up to some tenths of a second.

    Args:
        message: as the client sent it.
        admitted: the build has waited for its turn since it was checked, so that rules may have
            expired.

    Raises:
        ConfigError: its text has mistakes, or is too long; all of them with file and line.
        UsageError: the name of its file is none.
    """
    if not 0 < len(message.file) <= MAX_FILE_NAME or not message.file.isprintable():
        raise UsageError(
            f"the network policy of a build has a file name of at most {MAX_FILE_NAME} characters"
        )
    if len(message.text.encode()) > MAX_BYTES:
        raise ConfigError(
            f"{message.file} is larger than {MAX_BYTES >> 10} KiB, which is the most for the "
            "network policy of a build"
        )
    reading = read_text(message.text, file=message.file, layer=Layer.BUILD, version=int(admitted))
    return BuildPolicy(_key(message), reading.require())


def _key(message: NetworkPolicy) -> str:
    """Return what is the same for texts that say the same in the same lines.

    The name of the file belongs to it: refusals name it.
    """
    lines = "\n".join(line.rstrip() for line in message.text.splitlines()).rstrip()
    return hashlib.sha256(f"{message.file}\0{lines}".encode()).hexdigest()[:_KEY_DIGITS]
