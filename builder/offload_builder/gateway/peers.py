"""From which address a call comes: the front tells the servers behind it.

TLS ends behind the front, at a unix socket. So the front names its own end of that connection after
the client, in the abstract namespace (unix(7)), and gRPC shows the name as the peer of the call.
"""

from __future__ import annotations

import itertools
import re
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from grpc import aio

_PREFIX = f"offload-{secrets.token_hex(8)}"
"""Not to be guessed, though nobody else may connect to the sockets."""
_MAX_HOST = 60
_NUMBERS = itertools.count()
_PEER = re.compile(rf"unix-abstract:{_PREFIX}/([^/]*)/\d+")


def socket_name(host: str) -> bytes:
    """Return a name for a socket that speaks for a client; each is another one."""
    return b"\0" + f"{_PREFIX}/{host[:_MAX_HOST]}/{next(_NUMBERS)}".encode("ascii", "replace")


def peer_host(context: aio.ServicerContext[Any, Any]) -> str:
    """Return the client's IP address; empty when the call did not come through the front."""
    match = _PEER.fullmatch(unquote(context.peer() or ""))
    return match[1] if match is not None else ""
