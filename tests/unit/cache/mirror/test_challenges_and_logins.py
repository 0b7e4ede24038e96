"""What registries ask for, and where the pool's logins come from."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from offload_cache.mirror.challenges import Challenge, parse_challenges
from offload_cache.mirror.logins import Login, Logins, LoginSource
from offload_core.errors import ConfigError


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="x"', [Challenge("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://a/t",service="s", scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        (
            'Bearer realm=plain, Basic realm="q\\"q"',
            [Challenge("bearer", {"realm": "plain"}), Challenge("basic", {"realm": 'q"q'})],
        ),
        ("Negotiate", [Challenge("negotiate", {})]),
        ("=,=", []),
        ("", []),
    ],
)
def test_challenges_are_read(header, expected):
    assert parse_challenges([header]) == expected


async def test_login_comes_from_a_file_and_is_read_again_when_it_is_refused(tmp_path):
    file = tmp_path / "password"
    file.write_text("one\n")
    logins = Logins("registry.example", LoginSource("ali", file))
    first = await logins.get()
    assert first is not None
    assert base64.b64decode(first.basic.removeprefix("Basic ")) == b"ali:one"
    file.write_text("two")
    assert await logins.get() == first
    second = await logins.get(fresh=True)
    assert second == Login("ali", "two")
    file.unlink()
    assert await logins.get(fresh=True) is None


async def test_login_comes_from_a_variable(monkeypatch):
    monkeypatch.setenv("POOL_PASSWORD", "secret")
    logins = Logins("registry.example", LoginSource("ali", password_env="POOL_PASSWORD"))
    assert await logins.get() == Login("ali", "secret")


async def test_login_comes_from_a_credential_helper(tmp_path, monkeypatch):
    helper = tmp_path / "docker-credential-pool"
    helper.write_text(
        "#!/bin/sh\nread host\n"
        'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"for $host\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    logins = Logins("registry.example", LoginSource(helper="pool"))
    login = await logins.get()
    assert login == Login("<token>", "for registry.example")
    assert login.is_identity_token
    helper.write_text("#!/bin/sh\nexit 1\n")
    assert await logins.get(fresh=True) is None
    helper.write_text("#!/bin/sh\necho broken\n")
    assert await logins.get(fresh=True) is None
    assert await Logins("x", LoginSource(helper="missing")).get() is None


def test_login_is_never_shown():
    assert "open" not in repr(Login("ali", "open sesame"))


@pytest.mark.parametrize(
    "values",
    [
        {"username": "ali"},
        {"password_env": "X"},
        {"username": "ali", "password_env": "X", "helper": "y"},
        {"username": "ali", "helper": "y"},
        {"helper": "../y"},
        {"username": "ali", "password_env": "X", "password_file": Path("x")},
    ],
)
def test_half_a_login_is_refused(values):
    with pytest.raises(ConfigError):
        LoginSource(**values)
