"""The runc that BuildKit starts: it takes CAP_NET_RAW away, and tells of memory that ran out.

Where the whole machine has no memory left, the kernel ends steps before BuildKit and the node:
they say so of themselves (`oomScoreAdj`).

Steps may share a network namespace with BuildKit. Its plain HTTP to the node's registry, with the
secret names of all builds' repositories in it, could then be read by any step that opens a packet
socket. BuildKit has no setting for the capabilities of steps, so the specification is changed on
its way to runc.

Each step waits for this program, so it is one shell script without a process of its own, except
for sed. Where a node hears of steps before they run (the *gate*), it changes the specification
itself and says so; sed is for everything else.

Sources: BuildKit's `executor/runcexecutor` writes `config.json` without white space; go-runc names
the files with `--bundle` and, for further processes in a container, `--process`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from typing import TYPE_CHECKING

from offload_builder.buildkit.outofmemory import FOLDER, SHELL

if TYPE_CHECKING:
    from pathlib import Path

DROPPED = "dropped"
"""What the gate puts into `$answer`, and behind it the number of the process (`$$`), when the
specification of this step needs no change more."""

_SCRIPT = r"""#!/bin/sh
# Nothing of these comes from the environment: it could answer for the gate.
bundle= file= previous= answer= verb=
for word do
    case $previous in
        --bundle) bundle=$word file=$word/config.json ;;
        --process) file=$word ;;
    esac
    case $word in delete) verb=delete ;; esac
    previous=$word
done
@GATE@
@MEMORY@
# Inside texts of the file every quotation mark has a backslash, so only the object itself matches.
if [ -n "$file" ] && [ "$answer" != "@DROPPED@ $$" ]; then
    LC_ALL=C sed -i -e ':a' \
        -e 's/\("capabilities":{[^}]*\)"CAP_NET_RAW",/\1/;ta' \
        -e 's/\("capabilities":{[^}]*\),"CAP_NET_RAW"/\1/;ta' \
        -e 's/\("capabilities":{[^}]*\)"CAP_NET_RAW"/\1/;ta' \
        -e 's/"process":{"/"process":{"oomScoreAdj":@SCORE@,"/' "$file" || exit 1
fi
exec @RUNC@ "$@"
"""

_CAPABILITIES = re.compile(rb'"capabilities":\{[^}]*\}')
STEP_OOM_SCORE = 500
_PROCESS = re.compile(rb'"process":\{(?=")')
_ENTRY = re.compile(rb'"CAP_NET_RAW",|,?"CAP_NET_RAW"')


def write_runc_wrapper(folder: Path, runc: Path, gate: str = "") -> Path:
    """Write the program into a directory that only we can write to; return its path.

    Args:
        folder: the directory.
        runc: the real container runtime.
        gate: shell commands that run before each step, whose bundle is `$bundle` (else empty);
            they may set `$answer`, see `DROPPED`.

    Raises:
        OSError: it cannot be written.
    """
    text = _SCRIPT.replace("@GATE@\n", gate)
    memory = SHELL.format(folder=shlex.quote(str(folder / FOLDER)), root=shlex.quote(str(folder)))
    text = text.replace("@MEMORY@\n", memory)
    text = text.replace("@SCORE@", str(STEP_OOM_SCORE))
    text = text.replace("@DROPPED@", DROPPED).replace("@RUNC@", shlex.quote(str(runc)))
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    (folder / FOLDER).mkdir(mode=0o700)
    path = folder / "runc"
    # A new file: the old one may be busy, and a half-written script must never run.
    fresh = folder / "runc.new"
    fresh.write_text(text)
    fresh.chmod(0o700)
    return fresh.replace(path)


def restrict_step(specification: Path) -> bool:
    """Do to a specification what the program does; return whether it is done.

    Raises:
        OSError: it cannot be read or written.
    """
    with specification.open("r+b") as file:
        data = file.read()
        found = _CAPABILITIES.search(data)
        if found is None:
            return False
        less = _ENTRY.sub(b"", found[0])
        changed = data[: found.start()] + less + data[found.end() :]
        changed = _PROCESS.sub(b'"process":{"oomScoreAdj":%d,' % STEP_OOM_SCORE, changed, count=1)
        if changed != data:
            file.seek(0)
            file.write(changed)
            file.truncate()
    return True
