"""What registries ask for, and where the pool's logins come from."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest

from offload_cache.mirror import loginhelper
from offload_cache.mirror.challenges import Challenge, parse_challenges
from offload_cache.mirror.logins import Login, Logins, LoginSource
from offload_cache.mirror.patterns import matches
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


async def test_short_lived_login_is_renewed_before_it_expires(tmp_path):
    script = tmp_path / "cloud-login"
    script.write_text(
        "#!/bin/sh\ncat > /dev/null\necho x >> $0.runs\n"
        "runs=$(wc -l < $0.runs)\n"
        'echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"s$runs\\",'
        ' \\"ExpiresAt\\": \\"$(date -u -d @$(($(date +%s) + $1)) +%Y-%m-%dT%H:%M:%SZ)\\"}"\n'
    )
    script.chmod(0o755)
    long = Logins("r.example", LoginSource(command=(str(script), "3600")))
    assert [await long.get() for _ in range(2)] == [Login("u", "s1")] * 2
    short = Logins("r.example", LoginSource(command=(str(script), "0")))
    assert [await short.get() for _ in range(2)] == [Login("u", "s2"), Login("u", "s3")]
    # A registry that refuses it gets a new one at once.
    assert await long.get(fresh=True) == Login("u", "s4")


async def test_helper_that_hangs_or_fails_is_one_sentence_and_holds_up_one_build(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loginhelper, "HELPER_SECONDS", 0.3)
    script = tmp_path / "cloud-login"
    script.write_text("#!/bin/sh\necho x >> $0.runs\nsleep 30 & sleep 30\n")
    script.chmod(0o755)
    logins = Logins("r.example", LoginSource(command=(str(script),)))
    began = time.monotonic()
    assert [await logins.get() for _ in range(3)] == [None] * 3
    assert time.monotonic() - began < 2
    assert logins.problem == (
        "the pool's login for r.example cannot be read: cloud-login did not answer in 0.3 seconds"
    )
    assert Path(f"{script}.runs").read_text() == "x\n"
    script.write_text("#!/bin/sh\necho no role for you\nexit 3\n")
    failing = Logins("r.example", LoginSource(command=(str(script),)))
    assert await failing.get() is None
    assert "cloud-login ended with code 3 and says: no role for you" in failing.problem


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("team/*", "team/app", True),
        ("team/*", "team/app/db", False),
        ("team/**", "team/app/db", True),
        ("team/**", "team", False),
        ("team", "teams", False),
        ("**", "any/thing", True),
        ("te?m/app", "team/app", True),
        ("t.am/app", "team/app", False),
        ("team/*", "other/team/app", False),
        ("team/*", "team/app\n", True),
        ("team/app", "team/app\n", False),
    ],
)
def test_patterns_of_repositories(pattern, name, fits):
    assert matches([pattern], name) is fits
