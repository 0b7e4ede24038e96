"""What all tests share. A missing part of the machine is a failure, never a skip."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Logins of tests never go to the keyring of whoever runs them.
os.environ.setdefault("OFFLOAD_KEYRING", "off")
# Nodes of tests use registries and servers on the loopback of this machine; the tests of the
# firewall say otherwise.
os.environ.setdefault("OFFLOAD_NODE_ISOLATION", "none")
# Engines that nobody uses cost time where few tests are of sessions.
os.environ.setdefault("OFFLOAD_NODE_SESSIONS_READY", "0")
# What a shell runs in the background ignores Ctrl-C, as does whatever that starts; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):  # type: ignore[no-untyped-def]
    """Give tests that are marked so the order in which they stand in their module."""
    standing = {item.nodeid: number for number, item in enumerate(items)}
    result = yield
    places = [place for place, item in enumerate(items) if item.get_closest_marker("in_order")]
    for name in {items[place].path for place in places}:
        own = [place for place in places if items[place].path == name]
        ordered = sorted((items[place] for place in own), key=lambda item: standing[item.nodeid])
        for place, item in zip(own, ordered, strict=True):
            items[place] = item
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):  # type: ignore[no-untyped-def]
    """Turn a skip into a failure: a test that does not run proves nothing."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; install what it needs"
    return report
