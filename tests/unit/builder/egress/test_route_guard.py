"""The shell that keeps containers beside BuildKit's proxy from running."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from offload_builder.egress.urls.routeguard import RouteGuard


def starts(guard: RouteGuard, bundle: Path, *spaces: dict[str, str], word: str = "sh") -> bool:
    linux = {"namespaces": [{"type": "pid"}, *spaces, {"type": "mount"}]}
    config = {"process": {"args": ["sh", "-c", word], "env": [f"A={word}"]}, "linux": linux}
    (bundle / "config.json").write_text(json.dumps(config, separators=(",", ":")))
    script = f"bundle={bundle}\n{guard.shell}\n"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "egress: this container has a network" in done.stderr
    return done.returncode == 0


@pytest.fixture
def guard(tmp_path):
    return RouteGuard(tmp_path / "a folder" / "proxied-only")


PROXIED = {"type": "network", "path": "/var/lib/o/net/proxy/abc123"}
DIRECT = {"type": "network", "path": "/var/lib/o/net/cni/abc123"}


def test_everything_starts_while_it_is_open(guard, tmp_path):
    guard.set(closed=True)
    guard.set(closed=False)
    guard.set(closed=False)
    assert starts(guard, tmp_path, DIRECT)
    assert starts(guard, tmp_path)


def test_only_what_has_no_route_of_its_own_starts_while_it_is_closed(guard, tmp_path):
    guard.set(closed=True)
    guard.set(closed=True)
    assert starts(guard, tmp_path, PROXIED)
    assert starts(guard, tmp_path, {"type": "network"})
    assert not starts(guard, tmp_path, DIRECT)
    # A step with the network of BuildKit has no such namespace.
    assert not starts(guard, tmp_path)
    inner = {"type": "network", "path": "/data/net/proxy/x/net/cni/abc123"}
    assert not starts(guard, tmp_path, inner)


def test_a_step_cannot_talk_its_way_past_it(guard, tmp_path):
    guard.set(closed=True)
    for space in (PROXIED, {"type": "network"}):
        word = json.dumps(space, separators=(",", ":"))
        assert not starts(guard, tmp_path, DIRECT, word=word)
        assert not starts(guard, tmp_path, word=word)


def test_what_cannot_be_read_does_not_start(guard, tmp_path):
    guard.set(closed=True)
    script = f"bundle={tmp_path}/none\n{guard.shell}\n"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=False)
    assert done.returncode == 1
    # Other words of runc name no bundle.
    assert subprocess.run(["/bin/sh", "-c", f"bundle=\n{guard.shell}"], check=False).returncode == 0
