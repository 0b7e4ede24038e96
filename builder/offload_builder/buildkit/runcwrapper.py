"""The runc that BuildKit starts: it takes CAP_NET_RAW away from build steps.

Steps may share a network namespace with BuildKit. Its plain HTTP to the node's registry, with the
secret names of all builds' repositories in it, could then be read by any step that opens a packet
socket. BuildKit has no setting for the capabilities of steps, so the specification is changed on
its way to runc.

Sources: BuildKit's `executor/runcexecutor` writes `config.json` without white space; go-runc names
the files with `--bundle` and, for further processes in a container, `--process`.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SCRIPT = r"""#!/bin/sh
before= file=
for argument in "$@"; do
    case "$before" in
        --bundle) file="$argument/config.json" ;;
        --process) file="$argument" ;;
    esac
    before="$argument"
done
# Inside texts of the file every quotation mark has a backslash, so only the object itself matches.
if [ -n "$file" ]; then
    LC_ALL=C sed -i -e ':a' \
        -e 's/\("capabilities":{[^}]*\)"CAP_NET_RAW",/\1/;ta' \
        -e 's/\("capabilities":{[^}]*\),"CAP_NET_RAW"/\1/;ta' "$file" || exit 1
fi
"""


def write_runc_wrapper(folder: Path, runc: Path) -> Path:
    """Write the program into a directory that only we can write to; return its path.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / "runc"
    path.write_text(f'{_SCRIPT}exec {shlex.quote(str(runc))} "$@"\n')
    path.chmod(0o700)
    return path
