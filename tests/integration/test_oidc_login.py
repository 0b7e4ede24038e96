"""Logging in with an identity provider, by the real commands, at a real gateway and provider."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from offload_client.connections import Connections
from offload_client.identity import load_identity, save_identity
from offload_client.invocation import Invocation, text_stream
from offload_client.oidc.browser import browser_login
from offload_client.oidc.device import device_login
from offload_client.oidc.person import Way, person_login
from offload_client.oidc.provider import discover
from offload_core.errors import AuthenticationError
from offload_core.trust import fetch_ca
from tests.fixtures.identityprovider import CLIENT_ID
from tests.fixtures.oidcgateway import RULES, OidcGateway

OFFLOAD = Path(sys.executable).with_name("offload")
PEOPLE = """
[issuer.corp]
url = "PROVIDER"
client_id = "offload-cli"
"""
PERSON_RULE = """
[[rule]]
name = "staff"
issuer = "corp"
when = { email = "*@example.com" }
role = "member"
projects = ["default"]
member = "{email}"
"""


@pytest.fixture
async def pool():
    async with OidcGateway() as running:
        yield running


class PeopleGateway(OidcGateway):
    """The provider is one for people."""

    def write(self) -> None:
        text = PEOPLE.replace("PROVIDER", self.provider.url) + self.further + PERSON_RULE
        (self.gateway.directory / "identity.toml").write_text(text)


@pytest.fixture
async def people():
    async with PeopleGateway() as running:
        running.provider.confirmed.set()
        yield running


def fingerprint(pool):
    return pool.gateway.admin_token.rpartition("_")[2]


def in_job(pool, home, **variables):
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OFFLOAD_GATEWAY": pool.gateway.address,
        "OFFLOAD_CA": fingerprint(pool),
        **variables,
    }


def github(pool):
    return {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{pool.provider.url}/job-token?v=1",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "job-secret",
        "GITHUB_ACTIONS": "true",
        "GITHUB_RUN_ID": "42",
    }


async def offload(environment, *arguments, code=0):
    process = await asyncio.create_subprocess_exec(
        OFFLOAD, *arguments, env=environment, cwd=environment["HOME"],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        output, complaint = await process.communicate()
    assert process.returncode == code, complaint.decode()
    return output.decode() if not code else complaint.decode()


async def who(environment):
    return json.loads(await offload(environment, "whoami", "--format", "json"))


def invocation(home, **environment):
    environment = {"HOME": str(home), "OFFLOAD_KEYRING": "off", **environment}
    return Invocation([], home, environment, 0, text_stream(1), text_stream(2))


# --- Pipelines.


async def test_job_of_github_logs_in_without_a_stored_secret(pool, tmp_path):
    environment = in_job(pool, tmp_path, **github(pool))
    told = await offload(environment, "login", f"https://{pool.gateway.address}", "--oidc")
    assert "(ci), projects: default" in told
    assert 'By the rule "project app" for project:app' in told
    me = await who(environment)
    assert me["identity"]["subject"] == "project:app"
    assert me["identity"]["rule"] == "project app"
    stored = next(tmp_path.rglob("identity"))
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert "job-secret" not in stored.read_text()


async def test_job_acts_without_login_and_leaves_nothing_behind(pool, tmp_path):
    assert (await who(in_job(pool, tmp_path, **github(pool))))["role"] == "ci"
    assert list(tmp_path.iterdir()) == []


async def test_login_of_another_job_is_not_used(pool, tmp_path):
    first = in_job(pool, tmp_path, **github(pool))
    await offload(first, "login", f"https://{pool.gateway.address}")
    before = len(await pool.gateway.gateway._members.external.list())
    await who(first)
    assert len(await pool.gateway.gateway._members.external.list()) == before
    await who(first | {"GITHUB_RUN_ID": "43"})
    assert len(await pool.gateway.gateway._members.external.list()) == before + 1


async def test_token_of_a_variable_as_gitlab_gives_it(pool, tmp_path):
    token = pool.provider.token()
    environment = in_job(pool, tmp_path, GITLAB_CI="true", OFFLOAD_ID_TOKEN=token)
    assert (await who(environment))["role"] == "ci"
    assert (await who(environment))["role"] == "ci"


async def test_token_of_circleci(pool, tmp_path):
    environment = in_job(pool, tmp_path, CIRCLE_OIDC_TOKEN_V2=pool.provider.token())
    assert (await who(environment))["role"] == "ci"


async def test_token_of_a_file(pool, tmp_path):
    (tmp_path / "token").write_text(pool.provider.token() + "\n")
    environment = in_job(pool, tmp_path, OFFLOAD_ID_TOKEN_FILE="token")
    assert (await who(environment))["role"] == "ci"


async def test_token_of_a_command(pool, tmp_path):
    script = tmp_path / "mint"
    script.write_text(f'#!/bin/sh\n[ "$OFFLOAD_AUDIENCE" = offload.test ] && echo '
                      f"{pool.provider.token()}\n")  # fmt: skip
    script.chmod(0o755)
    environment = in_job(pool, tmp_path, OFFLOAD_ID_TOKEN_COMMAND=f"'{script}' now")
    assert (await who(environment))["role"] == "ci"
    script.write_text("#!/bin/sh\necho 'no job' >&2\nexit 3\n")
    assert "ended with 3: no job" in await offload(environment, "whoami", code=4)


async def test_buildkite_asks_its_agent_for_the_audience_of_the_gateway(pool, tmp_path):
    agent = tmp_path / "bin" / "buildkite-agent"
    agent.parent.mkdir()
    wanted = "oidc request-token --audience offload.test"
    agent.write_text(f'#!/bin/sh\n[ "$*" = "{wanted}" ] && echo {pool.provider.token()}\n')
    agent.chmod(0o755)
    environment = in_job(
        pool, tmp_path, BUILDKITE="true", BUILDKITE_AGENT_ACCESS_TOKEN="x",
        PATH=f"{agent.parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert (await who(environment))["role"] == "ci"


async def test_job_without_the_permission_is_told_what_it_lacks(pool, tmp_path):
    environment = in_job(pool, tmp_path, GITHUB_ACTIONS="true")
    url = f"https://{pool.gateway.address}"
    assert "id-token: write" in await offload(environment, "login", url, code=125)


async def test_gateway_with_another_ca_never_sees_the_token(pool, tmp_path):
    environment = in_job(pool, tmp_path, **github(pool)) | {"OFFLOAD_CA": "0" * 64}
    assert "another fingerprint" in await offload(environment, "whoami", code=4)
    assert "/job-token" not in pool.provider.requests


async def test_unknown_ca_is_refused_with_a_remedy(pool, tmp_path):
    environment = in_job(pool, tmp_path, **github(pool))
    del environment["OFFLOAD_CA"]
    assert "OFFLOAD_CA" in await offload(environment, "whoami", code=4)
    url = f"https://{pool.gateway.address}"
    assert "--ca" in await offload(environment, "login", url, "--oidc", code=3)
    (tmp_path / "offload.toml").write_text(
        f'gateway = "{url}"\ngateway_ca = "{fingerprint(pool)}"\n'
    )
    assert (await who(environment))["role"] == "ci"


async def test_provider_of_the_job_that_refuses_is_named(pool, tmp_path):
    environment = in_job(pool, tmp_path, **github(pool))
    environment["ACTIONS_ID_TOKEN_REQUEST_TOKEN"] = "wrong"
    assert "GitHub Actions refuses" in await offload(environment, "whoami", code=4)


async def test_token_of_the_gateway_goes_before_that_of_the_job(pool, tmp_path):
    environment = in_job(pool, tmp_path, OFFLOAD_TOKEN=pool.gateway.admin_token, **github(pool))
    assert (await who(environment))["member"] == "admin"


# --- People.


async def test_browser_login_by_the_command(people, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\n"
        "print(urllib.request.urlopen(sys.argv[1]).read().decode())\n"
    )
    browser.chmod(0o755)
    environment = in_job(people, tmp_path, BROWSER=str(browser), OFFLOAD_KEYRING="off")
    url = f"https://{people.gateway.address}"
    assert "as corp+alice@example.com (member)" in await offload(
        environment, "login", url, "--browser"
    )
    assert (await who(environment))["member"] == "corp+alice@example.com"


async def test_device_login_by_the_command(people, tmp_path):
    environment = in_job(people, tmp_path, OFFLOAD_KEYRING="off")
    url = f"https://{people.gateway.address}"
    assert "(member)" in await offload(environment, "login", url)


async def test_device_login_waits_for_the_person(people):
    people.provider.confirmed.clear()
    lines: list[str] = []
    provider = await discover(people.provider.url, CLIENT_ID, ("openid",), {})
    task = asyncio.create_task(device_login(provider, lines.append))
    await asyncio.sleep(0.3)
    assert not task.done()
    assert "WDJB-MJHT" in lines[0]
    people.provider.confirmed.set()
    async with asyncio.timeout(5):
        assert (await task).refresh_token


@pytest.mark.parametrize("answer", ["access_denied", "expired_token", "invalid_grant"])
async def test_device_login_that_is_refused_ends(people, answer):
    people.provider.device_answers = ["authorization_pending", answer]
    provider = await discover(people.provider.url, CLIENT_ID, ("openid",), {})
    async with asyncio.timeout(5):
        with pytest.raises(AuthenticationError):
            await device_login(provider, lambda _: None)


async def fetch(url):
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_browser_that_brings_an_answer_of_somebody_else_is_sent_away(people):
    provider = await discover(people.provider.url, CLIENT_ID, ("openid",), {})
    pages: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def open_page(url: str) -> bool:
        loop.call_soon_threadsafe(pages.put_nowait, url)
        return True

    task = asyncio.create_task(browser_login(provider, lambda _: None, open_page))
    from urllib.parse import parse_qs, urlsplit

    page = await pages.get()
    back = parse_qs(urlsplit(page).query)["redirect_uri"][0]
    assert back.startswith("http://127.0.0.1:")
    assert (await fetch(f"{back}?code=stolen&state=guessed"))[0] == 400
    assert (await fetch(f"{back}?code=stolen"))[0] == 400
    assert (await fetch(back.replace("callback", "x")))[0] == 404
    assert not task.done()
    assert "logged in" in (await fetch(page))[1]
    async with asyncio.timeout(5):
        assert (await task).id_token


async def test_answer_of_another_provider_ends_the_login(people):
    provider = await discover(people.provider.url, CLIENT_ID, ("openid",), {})
    loop = asyncio.get_running_loop()
    pages: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(
        browser_login(
            provider,
            lambda _: None,
            lambda url: bool(loop.call_soon_threadsafe(pages.put_nowait, url)),
        )
    )
    from urllib.parse import parse_qs, urlsplit

    query = parse_qs(urlsplit(await pages.get()).query)
    state = query["state"][0]
    await fetch(f"{query['redirect_uri'][0]}?code=x&state={state}&iss=https://evil.example")
    with pytest.raises(AuthenticationError, match="another identity provider"):
        await task


async def logged_in(people, home):
    me = invocation(home)
    ca = await fetch_ca(people.gateway.address, fingerprint(people))
    identity, _ = await person_login(me, people.gateway.address, ca, Way.DEVICE)
    save_identity(me, people.gateway.address, identity)
    return me, identity


def aged(identity, seconds_left):
    import dataclasses

    return dataclasses.replace(identity, expires_at=time.time() + seconds_left)


async def test_login_is_renewed_in_silence_also_after_its_end(people, tmp_path):
    me, identity = await logged_in(people, tmp_path)
    assert identity.expires_at - time.time() < 3601
    for left in (60, -60):
        save_identity(me, people.gateway.address, aged(
            load_identity(me, people.gateway.address, ended_too=True), left
        ))  # fmt: skip
        async with Connections() as connections:
            fresh = await connections.identity(me, people.gateway.address)
        assert fresh.expires_at - time.time() > 3000
        assert fresh.keys.certificate_pem != identity.keys.certificate_pem
        assert load_identity(me, people.gateway.address) == fresh


async def test_commands_at_once_renew_one_after_the_other(people, tmp_path):
    me, identity = await logged_in(people, tmp_path)
    save_identity(me, people.gateway.address, aged(identity, -60))

    async def one():
        async with Connections() as connections:
            return await connections.identity(me, people.gateway.address)

    found = await asyncio.gather(*(one() for _ in range(5)))
    assert len({item.keys.certificate_pem for item in found}) == 1
    assert people.provider.requests.count("refresh_token") == 1


async def test_login_ends_when_the_provider_says_so(people, tmp_path):
    me, identity = await logged_in(people, tmp_path)
    people.provider.refresh_lasts = False
    save_identity(me, people.gateway.address, aged(identity, 60))
    async with Connections() as connections:
        kept = await connections.identity(me, people.gateway.address)
        assert kept.keys == identity.keys
        save_identity(me, people.gateway.address, aged(identity, -60))
        with pytest.raises(AuthenticationError, match="has expired") as caught:
            await connections.identity(me, people.gateway.address)
    assert "offload login" in caught.value.hint


async def test_refresh_token_survives_a_gateway_that_is_away(people, tmp_path):
    me, identity = await logged_in(people, tmp_path)
    address = people.gateway.address
    save_identity(me, address, aged(identity, -60))
    await people.gateway.stop()
    async with Connections() as connections:
        with pytest.raises(AuthenticationError, match="has expired"):
            await connections.identity(me, address)
    kept = load_identity(me, address, ended_too=True)
    assert kept.origin.refresh_token != identity.origin.refresh_token


async def test_person_whom_no_rule_knows_is_refused(people, tmp_path):
    people.provider.person = {"sub": "eve", "email": "eve@evil.example"}
    environment = in_job(people, tmp_path, OFFLOAD_KEYRING="off")
    url = f"https://{people.gateway.address}"
    assert "no identity rule" in await offload(environment, "login", url, "--device", code=4)


async def test_token_of_another_client_of_the_provider_is_refused(people):
    token = people.provider.token(aud=CLIENT_ID, azp="other-client", **people.provider.person)
    assert "another client" in (await people.refusal(token)).message


async def test_gateway_without_a_provider_for_people_says_so(pool, tmp_path):
    environment = in_job(pool, tmp_path)
    url = f"https://{pool.gateway.address}"
    assert "no identity provider for people" in await offload(environment, "login", url, code=3)


async def test_secrets_lie_in_the_keyring_where_there_is_one(people, tmp_path):
    vault = tmp_path / "vault.json"
    environment = in_job(
        people, tmp_path, PYTHON_KEYRING_BACKEND="tests.fixtures.vaultkeyring.VaultKeyring",
        PYTHONPATH=str(Path(__file__).parents[2]), VAULT=str(vault),
    )  # fmt: skip
    url = f"https://{people.gateway.address}"
    await offload(environment, "login", url)
    stored = next((tmp_path / ".config").rglob("identity")).read_text()
    assert "PRIVATE KEY" not in stored
    secrets = json.loads(vault.read_text())
    assert len(secrets) == 1
    assert "PRIVATE KEY" in json.loads(next(iter(secrets.values())))["key"]
    assert (await who(environment))["member"] == "corp+alice@example.com"
    await offload(environment, "login", url)
    assert len(json.loads(vault.read_text())) == 1
    await offload(environment, "logout")
    assert json.loads(vault.read_text()) == {}


async def test_logout_ends_the_refresh_token_at_the_provider(people, tmp_path):
    environment = in_job(people, tmp_path)
    url = f"https://{people.gateway.address}"
    await offload(environment, "login", url)
    assert people.provider.refresh_tokens == 1
    await offload(environment, "logout")
    assert people.provider.refresh_tokens == 0
    await offload(environment, "login", url)
    people.provider.discovery_changes = {"revocation_endpoint": ""}
    assert "Removed the login" in await offload(environment, "logout")
    assert people.provider.refresh_tokens == 1
    assert not list((tmp_path / ".config").rglob("identity"))


# --- Rules that change.


async def test_changed_rules_hold_without_a_restart_and_wrong_ones_change_nothing(pool):
    await pool.exchange(pool.provider.token())

    async def eventually(subject, taken):
        async with asyncio.timeout(10):
            while True:
                try:
                    await pool.exchange(pool.provider.token(sub=subject))
                    got = True
                except Exception:
                    got = False
                if got == taken:
                    return
                await asyncio.sleep(0.2)

    pool.rules = RULES.replace("project:app", "project:other")
    pool.write()
    await eventually("project:other", True)
    await eventually("project:app", False)
    pool.rules = "this is not TOML"
    pool.write()
    await asyncio.sleep(2.5)
    await pool.exchange(pool.provider.token(sub="project:other"))
