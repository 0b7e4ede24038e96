"""The short way into a running helper: no imports beyond the interpreter's own.

Importing gRPC and its messages costs a Python process more than a warm build takes. So a command
hands its arguments, directory, environment and three descriptors to a helper of the same user,
and waits for an exit code. Wire format over a unix stream socket: 4 bytes length, then fields
separated by NUL: cwd, umask, number of arguments, arguments, `NAME=VALUE`...; descriptors 0, 1
and 2 travel with the first byte (SCM_RIGHTS). Back come 4 bytes of exit code; a lone `I` or `T`
sent meanwhile means SIGINT or SIGTERM. An exit code of `DECLINED` says: run it yourself.
"""

from __future__ import annotations

import os
import sys

DECLINED = 0xFFFF
IN_PROCESS_ONLY = frozenset(("--help", "-h", "--version"))


def helper_enabled(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Return whether a helper may be used: not in pipelines, and not when OFFLOAD_RESIDENT=0."""
    setting = environment.get("OFFLOAD_RESIDENT", "")
    return setting == "1" or (setting != "0" and not environment.get("CI"))


def socket_path(environment: os._Environ[str] | dict[str, str]) -> str:
    """Return where the helper of this user and this installation listens."""
    base = environment.get("XDG_RUNTIME_DIR")
    folder = f"{base}/offload" if base else f"/tmp/offload-{os.getuid()}"  # noqa: S108 - 0700, checked
    # One helper per installation: another virtual environment may hold other code.
    return f"{folder}/{abs(_stable_hash(__file__)):x}.sock"


def run_in_helper(arguments: list[str]) -> int | None:
    """Run the command in the helper; None when it has to run in this process."""
    if not helper_enabled(os.environ) or not IN_PROCESS_ONLY.isdisjoint(arguments):
        return None
    path = socket_path(os.environ)
    try:
        status = os.lstat(path)
        folder = os.lstat(path.rpartition("/")[0])
    except OSError:
        return None
    if status.st_uid != os.getuid() or folder.st_uid != os.getuid() or folder.st_mode & 0o077:
        return None
    return _run(path, arguments)


def _run(path: str, arguments: list[str]) -> int | None:
    # The C module below `socket`: the Python one costs as much as the interpreter's own start.
    import _signal  # type: ignore[import-not-found]
    import _socket

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.settimeout(2.0)
    try:
        connection.connect(path)
        mask = os.umask(0o077)
        os.umask(mask)
        fields = [os.getcwd(), str(mask), str(len(arguments)), *arguments]  # noqa: PTH109
        fields += [f"{name}={value}" for name, value in os.environ.items()]
        payload = "\0".join(fields).encode("utf-8", "surrogateescape")
        descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
        head = len(payload).to_bytes(4, "big")
        connection.sendmsg([head], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
        connection.sendall(payload)
        connection.settimeout(None)
    except OSError:
        connection.close()
        return None

    def forward(number: int, _frame: object) -> None:
        connection.send(b"I" if number == _signal.SIGINT else b"T")
        # A second one ends the command at once; the helper sees the connection close.
        _signal.signal(number, _signal.SIG_DFL)

    _signal.signal(_signal.SIGINT, forward)
    _signal.signal(_signal.SIGTERM, forward)
    data = b""
    while len(data) < 4:
        try:
            part = connection.recv(4 - len(data))
        except OSError:
            part = b""
        if not part:
            sys.stderr.write("ERROR: the resident helper died; run the command again\n")
            return 70
        data += part
    code = int.from_bytes(data, "big")
    return None if code == DECLINED else code


def _stable_hash(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value
