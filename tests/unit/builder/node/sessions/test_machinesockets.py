"""Which sockets processes of engines can make."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from offload_builder.node.sessions.engine.machinesockets import _CALLS, _filter

_PROGRAM = """
import ctypes, errno, socket
from offload_builder.node.sessions.engine.machinesockets import refuse_machine_sockets
refuse_machine_sockets()
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK):
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
        print(family.name)
    except OSError as error:
        print(family.name, errno.errorcode[error.errno])
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 1, None), errno.errorcode[ctypes.get_errno()])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="without rights the kernel takes no such filter")
def test_sockets_that_reach_past_network_namespaces_are_refused():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    said = done.stdout.splitlines()
    assert "AF_INET" in said, done.stderr
    assert "AF_UNIX" in said
    assert said[-2:] == ["AF_VSOCK EAFNOSUPPORT", "-1 ENOSYS"]


@pytest.mark.parametrize("machine", sorted(_CALLS))
def test_every_machine_has_a_filter_that_the_kernel_can_hold(machine):
    code = _filter(machine)

    assert len(code) % ctypes.sizeof(ctypes.c_uint64) == 0
    assert len(code) // 8 <= 4096
