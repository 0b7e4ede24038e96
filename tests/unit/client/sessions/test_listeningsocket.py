"""The sockets of helpers that follow each other."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

from offload_client.sessions.listeningsocket import ListeningSocket


def test_a_helper_that_ends_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    former = ListeningSocket(path)
    assert former.in_place
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # As after a session that was stopped and started again at once.
    follower = ListeningSocket(path)
    assert not former.in_place
    former.remove()
    former.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        follower.socket.accept()[0].close()
    follower.remove()
    assert not path.exists()
    assert not follower.in_place
    follower.close()
