"""The short way into a running helper: no imports beyond the interpreter's own.

Importing gRPC and its messages costs a Python process more than a warm build takes. So a command
hands its arguments, directory, environment and three descriptors to a helper of the same user,
and waits for an exit code. Wire format over a unix stream socket: the helper says `READY`; a
connection that ends before it says: run the command yourself. Then come 4 bytes of length and
fields separated by NUL: cwd, number of arguments, arguments, `NAME=VALUE`...; descriptors 0, 1
and 2 travel with the first byte (SCM_RIGHTS). They wait for `READY`, because in the queue of a
helper that hangs they would keep the user's pipes open. Back come 4 bytes of exit code; a lone
`I` or `T` sent meanwhile means SIGINT or SIGTERM, which `AGAIN` answers if the command goes on.
"""

from __future__ import annotations

import os
import sys

PROTOCOL = 2
"""Raised with every change of the wire format, so that a command never meets an older helper."""
READY = b"+"
AGAIN = b"\xff\xff\xff\xff"
"""In the place of an exit code: a signal did not end the command, the next one is wanted too."""
READY_SECONDS = 2.0
IN_PROCESS_ONLY = frozenset(("--help", "-h", "--version"))
HELPER_DIED = 70
MAX_PATH_BYTES = 100
"""sun_path has 108 bytes (unix(7)); the helper adds a suffix while it starts."""


def helper_enabled(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Return whether a helper may be used.

    Not in pipelines, which set CI or OFFLOAD_TOKEN, and not with OFFLOAD_RESIDENT=0.
    """
    setting = environment.get("OFFLOAD_RESIDENT", "")
    if setting in ("0", "1"):
        return setting == "1"
    return not environment.get("CI") and not environment.get("OFFLOAD_TOKEN")


def socket_path(environment: os._Environ[str] | dict[str, str]) -> str:
    """Return where a helper listens that sees the system as this process does."""
    # One per installation, as another virtual environment may hold other code; and one for each
    # view of the system: files would get other modes, paths and addresses mean something else,
    # docker's socket may not be open to a helper of before the user joined its group.
    places = [_inode(name) for name in ("ns/mnt", "ns/net", "root")]
    view = (PROTOCOL, __file__, _umask(), os.getgroups(), places)
    name = f"{_stable_hash(repr(view)):x}.sock"
    base = environment.get("XDG_RUNTIME_DIR", "")
    path = f"{base}/offload/{name}"
    if base.startswith("/") and len(path.encode("utf-8", "surrogateescape")) <= MAX_PATH_BYTES:
        return path
    return f"/tmp/offload-{os.getuid()}/{name}"  # noqa: S108 - 0700 and its owner are checked


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _inode(name: str) -> tuple[int, int]:
    try:
        status = os.stat(f"/proc/self/{name}")  # noqa: PTH116 - pathlib is an import
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def run_in_helper(arguments: list[str]) -> int | None:
    """Run the command in the helper; None when it has to run in this process."""
    if not helper_enabled(os.environ) or not IN_PROCESS_ONLY.isdisjoint(arguments):
        return None
    if any(needs_this_process(argument) for argument in arguments):
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


def needs_this_process(argument: str) -> bool:
    """Return whether an argument may name something that only the command's own process sees."""
    # /dev/stdout, /dev/fd/63 of a shell's `<(...)`, /proc/self/cwd. /dev/shm is a plain directory.
    return "/proc/" in argument or "/dev/" in argument.replace("/dev/shm/", "")  # noqa: S108


def _run(path: str, arguments: list[str]) -> int | None:
    # The C module below `socket`: the Python one costs as much as the interpreter's own start.
    import _signal  # type: ignore[import-not-found]
    import _socket

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    if connection.fileno() <= 2:
        # A standard stream is closed, and the socket has taken its number.
        connection.close()
        return None
    connection.settimeout(READY_SECONDS)
    try:
        connection.connect(path)
        if connection.recv(1) != READY:
            connection.close()
            return None
        fields = [os.getcwd(), str(len(arguments)), *arguments]  # noqa: PTH109
        fields += [f"{name}={value}" for name, value in os.environ.items()]
        payload = "\0".join(fields).encode("utf-8", "surrogateescape")
        descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
        head = len(payload).to_bytes(4, "big")
        connection.sendmsg([head], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
        connection.sendall(payload)
    except OSError:
        connection.close()
        return None

    def forward(number: int, _frame: object) -> None:
        # A second one ends this process at once; the helper sees the connection close.
        _signal.signal(number, _signal.SIG_DFL)
        try:
            connection.send(b"I" if number == _signal.SIGINT else b"T")
        except OSError:
            # The helper is gone, which the main thread sees as well.
            return

    connection.settimeout(None)
    _signal.signal(_signal.SIGINT, forward)
    _signal.signal(_signal.SIGTERM, forward)
    data = b""
    while len(data) < 4:
        try:
            part = connection.recv(4 - len(data))
        except OSError:
            part = b""
        if not part:
            return _died()
        data += part
        if data == AGAIN:
            data = b""
            _signal.signal(_signal.SIGINT, forward)
    return int.from_bytes(data, "big")


def _died() -> int:
    # It may have hidden the cursor.
    show = "\x1b[?25h\n" if os.isatty(2) else ""
    text = (
        f"{show}ERROR: the resident helper of offload-build was killed; whether the build goes on "
        "says: offload builds\n"
    )
    try:
        os.write(2, text.encode())
    except OSError:
        return HELPER_DIED
    return HELPER_DIED


def _stable_hash(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value
