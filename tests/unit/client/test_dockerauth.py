"""Logins from docker's configuration, with real credential helpers."""

from __future__ import annotations

import base64
import contextvars
import json
import time
from pathlib import Path
from typing import Any

import pytest

from offload_client import credentialhelper
from offload_client.dockerauth import Credentials, credentials_for
from offload_client.eventlog import show_events
from offload_core.errors import ConfigError

_HELPER = """#!/bin/sh
[ "$1" = get ] || exit 2
read -r server
echo "$server" >> "{asked}"
case "$server" in
  slow.example.com) exec sleep 60 ;;
  broken.example.com) echo "keychain is locked"; exit 1 ;;
  odd.example.com) echo "no json" ;;
  token.example.com) echo '{{"ServerURL":"x","Username":"<token>","Secret":"tok-{name}"}}' ;;
  empty.example.com) echo "credentials not found in native keychain"; exit 1 ;;
  *) echo "{{\\"ServerURL\\":\\"x\\",\\"Username\\":\\"{name}\\",\\"Secret\\":\\"s-$server\\"}}" ;;
esac
"""


class Home:
    """A home directory with docker's configuration and credential helpers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        (root / ".docker").mkdir()
        self.environment = {"HOME": str(root), "PATH": f"{self.bin}:/usr/bin:/bin"}

    def configure(self, **config: Any) -> None:
        (self.root / ".docker" / "config.json").write_text(json.dumps(config))

    def helper(self, name: str) -> None:
        path = self.bin / f"docker-credential-{name}"
        path.write_text(_HELPER.format(name=name, asked=self.root / "asked"))
        path.chmod(0o755)

    def asked(self) -> list[str]:
        return (self.root / "asked").read_text().split()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def encoded(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_no_configuration_is_no_login(home: Home) -> None:
    assert credentials_for("ghcr.io", home.environment) is None


def test_encoded_login_is_read(home: Home) -> None:
    home.configure(auths={"ghcr.io": encoded("ann:pass:with:colons")})
    assert credentials_for("ghcr.io", home.environment) == ("ann", "pass:with:colons")
    assert credentials_for("ghcr.io:5000", home.environment) is None


def test_docker_config_variable_names_the_directory(home: Home, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"auths": {"a.io": encoded("u:p")}}))
    environment = {**home.environment, "DOCKER_CONFIG": str(other)}
    assert credentials_for("a.io", environment) == ("u", "p")


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io"])
def test_docker_hub_is_found_under_all_its_names(home: Home, host: str, key: str) -> None:
    home.configure(auths={key: encoded("ann:hub")})
    assert credentials_for(host, home.environment) == ("ann", "hub")


def test_key_with_scheme_and_path_matches_its_host(home: Home) -> None:
    home.configure(auths={"https://old.example.com/v1/": encoded("u:p")})
    assert credentials_for("old.example.com", home.environment) == ("u", "p")


def test_identity_token_has_no_user_name(home: Home) -> None:
    home.configure(auths={"acr.io": {**encoded("0000:"), "identitytoken": "refresh"}})
    assert credentials_for("acr.io", home.environment) == ("", "refresh")


def test_store_is_asked_for_hub_by_its_url(home: Home) -> None:
    home.helper("main")
    home.configure(credsStore="main", auths={"https://index.docker.io/v1/": {}})
    found = credentials_for("registry-1.docker.io", home.environment)
    assert found == ("main", "s-https://index.docker.io/v1/")
    assert home.asked() == ["https://index.docker.io/v1/"]


def test_helper_of_a_registry_wins_over_the_store(home: Home) -> None:
    home.helper("main")
    home.helper("cloud")
    home.configure(credsStore="main", credHelpers={"gcr.io": "cloud"})
    assert credentials_for("gcr.io", home.environment) == ("cloud", "s-gcr.io")
    assert credentials_for("ghcr.io", home.environment) == ("main", "s-ghcr.io")


def test_token_of_a_helper_has_no_user_name(home: Home) -> None:
    home.helper("main")
    home.configure(credsStore="main")
    assert credentials_for("token.example.com", home.environment) == ("", "tok-main")


@pytest.mark.parametrize("host", ["empty", "broken", "odd"])
def test_helper_without_an_answer_leaves_the_file(home: Home, host: str) -> None:
    home.helper("main")
    name = f"{host}.example.com"
    home.configure(credsStore="main", auths={name: encoded("file:secret")})
    assert credentials_for(name, home.environment) == ("file", "secret")


def test_missing_helper_is_no_login_and_a_warning(home: Home) -> None:
    told: list[str] = []
    home.configure(credsStore="desktop.exe")
    context = contextvars.copy_context()
    context.run(show_events, lambda _level, text: told.append(text), everything=False)
    assert context.run(credentials_for, "ghcr.io", home.environment) is None
    assert "docker-credential-desktop.exe" in told[0]


def test_slow_helper_is_given_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentialhelper, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(credentialhelper, "HELPER_SECONDS", 0.3)
    home.helper("main")
    home.configure(credsStore="main")
    assert credentials_for("slow.example.com", home.environment) is None


def test_helper_name_cannot_be_a_path(home: Home) -> None:
    home.configure(credsStore="../../evil")
    with pytest.raises(ConfigError, match="no name of a credential helper"):
        credentials_for("ghcr.io", home.environment)


def test_variable_with_logins_comes_first(home: Home) -> None:
    home.configure(auths={"ghcr.io": encoded("file:f")})
    auths = json.dumps({"auths": {"ghcr.io": encoded("variable:v")}})
    environment = {**home.environment, "DOCKER_AUTH_CONFIG": auths}
    assert credentials_for("ghcr.io", environment) == ("variable", "v")


def test_damaged_file_is_a_clear_error_without_its_content(home: Home) -> None:
    (home.root / ".docker" / "config.json").write_text('{"auths": {"x": {"auth": "c2VjcmV0"')
    with pytest.raises(ConfigError, match="not valid JSON") as caught:
        credentials_for("x", home.environment)
    assert "c2VjcmV0" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_secret_is_masked(home: Home) -> None:
    found = Credentials("ann", "hunter2")
    assert "hunter2" not in f"{found!r} {found} {[found]}"


def test_nothing_secret_is_logged(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    home.helper("main")
    home.configure(credsStore="main", auths={"broken.example.com": encoded("u:hunter2")})
    context = contextvars.copy_context()
    context.run(show_events, lambda level, text: told.append(f"{level}: {text}"), everything=True)
    found = context.run(credentials_for, "broken.example.com", home.environment)
    assert found is not None
    assert len(told) == 1
    assert told[0].startswith("warning: credential_helper.failed")
    assert "hunter2" not in told[0]
    assert encoded("u:hunter2")["auth"] not in told[0]
    assert capsys.readouterr() == ("", "")


def test_entry_for_a_part_of_a_registry_is_used_for_it(home: Home) -> None:
    home.helper("main")
    home.configure(
        credsStore="main",
        auths={
            "ghcr.io/shop": encoded("shop:1"),
            "ghcr.io/shop/deep/app": encoded("deep:2"),
            "https://index.docker.io/v1/": encoded("hub:3"),
            "docker.io/acme": encoded("acme:4"),
        },
    )
    found = {
        name: login.username
        for name in ("shop/app", "shop/deep/app", "shopping/app", "", "shop")
        if (login := credentials_for("ghcr.io", home.environment, name))
    }
    assert found == {
        "shop/app": "shop", "shop/deep/app": "deep", "shopping/app": "main", "": "main",
        "shop": "shop",
    }  # fmt: skip
    hub = credentials_for("registry-1.docker.io", home.environment, "acme/app")
    assert hub == ("acme", "4")


def test_part_of_a_registry_counts_for_all_of_it_when_nothing_else_does(home: Home) -> None:
    home.configure(auths={"ghcr.io/shop": encoded("shop:1")})
    assert credentials_for("ghcr.io", home.environment) == ("shop", "1")


def test_ports_tell_registries_apart(home: Home) -> None:
    home.configure(auths={"r.io:5000": encoded("a:1"), "http://r.io:6000/v2/": encoded("b:2")})
    assert credentials_for("r.io:5000", home.environment) == ("a", "1")
    assert credentials_for("r.io:6000", home.environment) == ("b", "2")
    assert credentials_for("r.io", home.environment) is None


def test_damaged_variable_is_a_warning_and_the_file_counts(home: Home) -> None:
    told: list[str] = []
    home.configure(auths={"ghcr.io": encoded("file:f")})
    context = contextvars.copy_context()
    context.run(show_events, lambda _level, text: told.append(text), everything=False)
    environment = {**home.environment, "DOCKER_AUTH_CONFIG": '{"auths": "hunter2"'}
    assert context.run(credentials_for, "ghcr.io", environment) == ("file", "f")
    assert "docker auth config ignored" in told[0]
    assert "hunter2" not in told[0]


def test_hanging_helper_is_told_of_long_before_it_is_given_up(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentialhelper, "HELPER_SECONDS", 2.5)
    told: list[tuple[float, str]] = []
    home.helper("main")
    home.configure(credsStore="main")
    began = time.monotonic()

    def tell(_level: str, text: str) -> None:
        told.append((time.monotonic() - began, text))

    context = contextvars.copy_context()
    context.run(show_events, tell, everything=False)
    assert context.run(credentials_for, "slow.example.com", home.environment) is None
    assert told[0][0] < 2
    assert "slow (helper=docker-credential-main, registry=slow.example.com" in told[0][1]
    assert "unlock a keychain" in told[0][1]
    assert "timed out" in told[1][1]


def test_words_of_a_failing_helper_are_shown(home: Home) -> None:
    told: list[str] = []
    home.helper("main")
    home.configure(credsStore="main")
    context = contextvars.copy_context()
    context.run(show_events, lambda _level, text: told.append(text), everything=False)
    assert context.run(credentials_for, "broken.example.com", home.environment) is None
    assert "says=keychain is locked" in told[0]
    assert "log in again" in told[0]
