"""Marks of connections that are open, by ctnetlink.

Sources: linux/netfilter/nfnetlink_conntrack.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from offload_builder.egress.firewall.tcppackets import Flow

_NETLINK_NETFILTER = 12
_MSG_NEW = 1 << 8
_NLM_REQUEST_ACK = 0x1 | 0x4
_NESTED = 0x8000
_TUPLE_ORIG, _MARK = 1, 8
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _PROTO_SOURCE, _PROTO_TARGET = 1, 2, 3
_SECONDS = 2.0


class ConnectionMarks:
    """Sets marks in the namespace that the thread of its making is in; close it.

    Raises:
        ConfigError: the kernel does not let us.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            self._socket.bind((0, 0))
            self._socket.settimeout(_SECONDS)
        except OSError as error:
            raise ConfigError(
                f"connections cannot be marked: {error.strerror}",
                hint="the kernel needs nf_conntrack_netlink",
            ) from error

    def mark(self, flow: Flow, value: int) -> bool:
        """Mark a TCP connection; return whether there is such a one.

        Raises:
            OSError: the kernel refused it for another reason.
        """
        v6 = flow.address.version == 6
        first = 3 if v6 else 1
        ends = _attribute(first, flow.source.packed) + _attribute(first + 1, flow.address.packed)
        protocol = (
            _attribute(_PROTO_NUM, b"\x06")
            + _attribute(_PROTO_SOURCE, struct.pack("!H", flow.source_port))
            + _attribute(_PROTO_TARGET, struct.pack("!H", flow.port))
        )
        tuple_ = _attribute(_TUPLE_IP | _NESTED, ends) + _attribute(
            _TUPLE_PROTO | _NESTED, protocol
        )
        body = struct.pack("!BBH", socket.AF_INET6 if v6 else socket.AF_INET, 0, 0)
        body += _attribute(_TUPLE_ORIG | _NESTED, tuple_)
        body += _attribute(_MARK, struct.pack("!I", value))
        self._socket.send(
            struct.pack("IHHII", 16 + len(body), _MSG_NEW, _NLM_REQUEST_ACK, 0, 0) + body
        )
        answer = self._socket.recv(4096)
        (code,) = struct.unpack_from("i", answer, 16)
        if code and -code != errno.ENOENT:
            raise OSError(-code, "the kernel refused a mark")
        return not code

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
