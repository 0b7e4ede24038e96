"""A failed build says what to do where BuildKit names the cause only."""

from __future__ import annotations

import pytest

from offload_client.cli.remedies import remedy
from offload_core.errors import BuildFailedError, NotFoundError, RegistryAuthError


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("write /x: no space left on device", "disk is full"),
        ("failed to solve: syntax error in pattern", "in .dockerignore"),
        ("unsupported request frontend.wish", "check, outline and targets"),
        ("exit code: 1", ""),
        # The node has said what to do.
        ("dial tcp 127.0.0.1:5000: connect: connection refused", ""),
        ("secret key: not found", ""),
    ],
)
def test_remedy_of_a_failed_build(message: str, advice: str) -> None:
    found = remedy(BuildFailedError(message))
    assert advice in found
    assert bool(advice) == bool(found)


def test_registry_that_asks_for_a_login_is_named() -> None:
    error = RegistryAuthError("HEAD request to http://r.example:5000/v2/a/blobs/x: 401")
    assert "docker login r.example:5000;" in remedy(error)
    assert "docker login;" in remedy(RegistryAuthError("401 Unauthorized"))


def test_other_errors_say_it_themselves() -> None:
    assert remedy(NotFoundError("secret key: not found")) == ""
