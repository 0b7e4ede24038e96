"""The link of the benchmarks and the fault tests, with real packets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.wan import Side, Wan

PORT = 5000
HOLDER = """
import time
from tests.fixtures.wan import Wan
with Wan() as wan:
    print(wan._bridge.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def pipe(wan: Wan, port: int = PORT) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from the client's side to the builder's."""
    with wan.builder.entered():
        listener = socket.create_server((wan.builder.address, port))
    with listener, connect(wan.client, (wan.builder.address, port)) as near:
        far, _ = listener.accept()
        with far:
            far.settimeout(10)
            yield near, far


def connect(side: Side, address: tuple[str, int]) -> socket.socket:
    with side.entered():
        return socket.create_connection(address, timeout=10)


def send(near: socket.socket, far: socket.socket, size: int) -> float:
    """Send bytes and wait until they have arrived; return the seconds."""
    began = time.monotonic()
    sender = threading.Thread(target=near.sendall, args=(bytes(size),))
    sender.start()
    left = size
    while left:
        left -= len(far.recv(min(left, 1 << 20)))
    sender.join()
    return time.monotonic() - began


def round_trip(near: socket.socket, far: socket.socket) -> float:
    began = time.monotonic()
    near.sendall(b"?")
    far.recv(1)
    far.sendall(b"!")
    near.recv(1)
    return time.monotonic() - began


def test_link_has_about_the_rate_and_the_delay_asked_for() -> None:
    with Wan(rate_bits=50e6, delay_seconds=0.02) as wan, pipe(wan) as (near, far):
        best = min(round_trip(near, far) for _ in range(5))
        assert 0.038 < best < 0.060
        send(near, far, 2_000_000)
        seconds = send(near, far, 10_000_000)
        # 1.6 s by the rate alone; what a busy machine adds only makes it slower.
        assert 1.5 < seconds < 4.0


def test_counters_hold_every_byte_with_its_headers() -> None:
    with Wan(rate_bits=None, delay_seconds=0.0) as wan:
        time.sleep(0.2)
        assert wan.client.counters().sent_bytes == 0, "something else uses the link"
        with pipe(wan) as (near, far):
            before = wan.client.counters()
            send(near, far, 5_000_000)
            found = wan.client.counters() - before
        # 52 bytes of headers on 1,448 of content: 3.6 %; nothing is lost here.
        assert 5_150_000 < found.sent_bytes < 5_300_000
        assert found.sent_packets >= 5_000_000 // 1448
        assert 0 < found.received_bytes < 500_000
        # The closing of the connection may still be on its way.
        deadline = time.monotonic() + 5
        while wan.builder.counters().received_bytes != wan.client.counters().sent_bytes:
            assert time.monotonic() < deadline, "bytes were lost, or are not counted"
            time.sleep(0.05)


def test_link_can_be_made_slow_and_fast_again() -> None:
    with Wan(rate_bits=None, delay_seconds=0.0) as wan, pipe(wan) as (near, far):
        assert round_trip(near, far) < 0.02
        wan.shape(rate_bits=100e6, delay_seconds=0.03)
        assert round_trip(near, far) > 0.055
        wan.shape(rate_bits=None, delay_seconds=0.0)
        assert round_trip(near, far) < 0.02


def test_cut_link_is_silent_and_goes_on_when_it_is_restored() -> None:
    with Wan(rate_bits=None, delay_seconds=0.0) as wan, pipe(wan) as (near, far):
        wan.cut()
        near.sendall(b"later")
        far.settimeout(0.5)
        with pytest.raises(TimeoutError):
            far.recv(5)
        wan.restore()
        far.settimeout(10)
        assert far.recv(5) == b"later"
        assert wan.statistics()["dropped_packets"] > 0


def test_broken_connections_are_noticed_at_both_ends() -> None:
    with Wan(rate_bits=None, delay_seconds=0.0) as wan, pipe(wan) as (near, far):
        wan.break_connections()
        for end in (near, far):
            with pytest.raises(OSError, match=r"abort|reset"):
                end.recv(1)
        with pipe(wan, PORT + 1) as (near, far):
            assert round_trip(near, far) < 5


def test_commands_run_at_a_side_and_see_the_machine_as_before() -> None:
    mounts = Path("/proc/mounts").read_text()
    with Wan() as wan:
        for side in (wan.client, wan.builder):
            done = subprocess.run(
                side.command("sh", "-c", "ip -brief address; cat /proc/mounts"),
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert side.address in done.stdout
            assert done.stdout.endswith(mounts)
        with wan.client.entered():
            inside = Path("/proc/thread-self/ns/net").readlink()
        assert inside != Path("/proc/thread-self/ns/net").readlink()


def test_nothing_is_left_when_the_process_that_made_a_link_is_killed() -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, cwd=root
    ) as holder:
        assert holder.stdout is not None
        bridge = Path(f"/proc/{int(holder.stdout.readline())}")
        assert bridge.exists()
        os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while bridge.exists():
        assert time.monotonic() < deadline, "the bridge still runs"
        time.sleep(0.02)
