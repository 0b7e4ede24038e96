"""Tokens that a system of continuous integration makes for its jobs, so that none is stored.

Sources: the reference pages of GitHub Actions (OpenID Connect), GitLab CI/CD (ID tokens), Buildkite
(`buildkite-agent oidc`) and CircleCI (OpenID Connect tokens).
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from offload_core.errors import AuthenticationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_client.invocation import Invocation

TOKEN_VARIABLE = "OFFLOAD_ID_TOKEN"  # noqa: S105 - a name
FILE_VARIABLE = "OFFLOAD_ID_TOKEN_FILE"
COMMAND_VARIABLE = "OFFLOAD_ID_TOKEN_COMMAND"
COMMAND_SECONDS = 60.0
GITHUB_PAUSES_SECONDS = (1.0, 3.0)
"""Before its service is asked again after a fault of its own."""
MAX_TOKEN_BYTES = 64 << 10

_JOB_VARIABLES = (
    "GITHUB_RUN_ID", "GITHUB_RUN_ATTEMPT", "GITHUB_JOB", "CI_JOB_ID", "BUILDKITE_JOB_ID",
    "CIRCLE_WORKFLOW_JOB_ID", "BUILD_TAG",
)  # fmt: skip


@dataclass(frozen=True)
class TokenSource:
    """Where a token comes from here.

    Attributes:
        name: for people.
        job: what differs from job to job: a login of another job is not this one's.
        token: returns a token for an audience.
    """

    name: str
    job: str
    token: Callable[[str], Awaitable[str]]


def find_source(invocation: Invocation) -> TokenSource | None:
    """Return where a token can be had without asking anybody; None outside of such a place."""
    environment = invocation.environment

    def source(name: str, token: Callable[[str], Awaitable[str]], detail: str = "") -> TokenSource:
        return TokenSource(name, _job(invocation, detail), token)

    if value := environment.get(TOKEN_VARIABLE, "").strip():
        return source(TOKEN_VARIABLE, lambda _: _ready(value), value)
    if path := environment.get(FILE_VARIABLE):
        return source(FILE_VARIABLE, lambda _: _from_file(invocation, path), path)
    if command := environment.get(COMMAND_VARIABLE):
        return source(COMMAND_VARIABLE, lambda audience: _from_command(
            invocation, _words(command, COMMAND_VARIABLE), COMMAND_VARIABLE, audience
        ), command)  # fmt: skip
    if environment.get("ACTIONS_ID_TOKEN_REQUEST_URL"):
        return source("GitHub Actions", lambda audience: _github(invocation, audience))
    if environment.get("BUILDKITE") == "true" and environment.get("BUILDKITE_AGENT_ACCESS_TOKEN"):
        return source("Buildkite", lambda audience: _from_command(
            invocation, ["buildkite-agent", "oidc", "request-token", "--audience", audience],
            "Buildkite's agent", audience,
        ))  # fmt: skip
    if value := environment.get("CIRCLE_OIDC_TOKEN_V2", "").strip():
        return source("CircleCI", lambda _: _ready(value), value)
    return None


def missing_source(invocation: Invocation) -> str:
    """Return what a job must ask for so that it gets a token; empty outside of known systems."""
    environment = invocation.environment
    if environment.get("GITHUB_ACTIONS") == "true":
        return "give the job the permission 'id-token: write'"
    if environment.get("GITLAB_CI") == "true":
        return f"add to the job: id_tokens: {{{TOKEN_VARIABLE}: {{aud: AUDIENCE}}}}"
    if environment.get("CIRCLECI") == "true":
        return "CircleCI gives forks no tokens unless the project allows it"
    return ""


def _job(invocation: Invocation, detail: str) -> str:
    parts = [detail] + [invocation.environment.get(name, "") for name in _JOB_VARIABLES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


async def _ready(token: str) -> str:
    return token


async def _from_file(invocation: Invocation, name: str) -> str:
    try:
        with invocation.path(name).open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{FILE_VARIABLE}: cannot read {name}: {error.strerror}") from error
    return _checked(data, FILE_VARIABLE)


async def _from_command(invocation: Invocation, words: list[str], what: str, audience: str) -> str:
    environment = dict(invocation.environment) | {"OFFLOAD_AUDIENCE": audience}
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            cwd=invocation.cwd,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ConfigError(f"{what}: cannot run {words[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            output, complaint = await process.communicate()
    except TimeoutError as error:
        raise AuthenticationError(
            f"{what}: {words[0]} gives no token within {COMMAND_SECONDS:.0f} s"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = complaint.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
        raise AuthenticationError(
            f"{what}: {words[0]} ended with {process.returncode}: {last[0][:300]}"
        )
    return _checked(output, what)


async def _github(invocation: Invocation, audience: str) -> str:
    # Here: a command that needs no token does not pay for the modules of HTTP.
    from offload_client.oidc.webcalls import call_json, provider_error

    environment = invocation.environment
    url = environment["ACTIONS_ID_TOKEN_REQUEST_URL"]
    url += f"{'&' if '?' in url else '?'}audience={quote(audience, safe='')}"
    secret = environment.get("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "")
    for pause in (*GITHUB_PAUSES_SECONDS, None):
        answer = await call_json(
            url,
            who="GitHub Actions",
            environment=environment,
            headers={"Authorization": f"Bearer {secret}"},
        )
        if answer.status < 500 or pause is None:
            break
        await asyncio.sleep(pause)
    if not answer.ok or not answer.text("value"):
        raise provider_error(answer, "GitHub Actions")
    return answer.text("value")


def _checked(data: bytes, what: str) -> str:
    if len(data) > MAX_TOKEN_BYTES:
        raise AuthenticationError(f"{what} gives more than a token")
    token = data.decode("utf-8", "replace").strip()
    if not token:
        raise AuthenticationError(f"{what} gives no token")
    return token


def _words(command: str, what: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{what}: the quotes do not match") from error
    if not words:
        raise ConfigError(f"{what} is empty")
    return words
