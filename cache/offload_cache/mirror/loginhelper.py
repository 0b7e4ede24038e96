"""Asking a program for a login, with the protocol of docker's credential helpers.

Source: the docker-credential-helpers project: the server's name on standard input, a JSON object
with Username and Secret on standard output. `ExpiresAt` is an addition of ours for programs that
make short-lived logins.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HELPER_SECONDS = 10.0
_MAX_WORDS = 200


class HelperError(Exception):
    """A helper gave no login; the text says why in one clause and holds no secret."""


@dataclass(frozen=True, slots=True, repr=False)
class HelperAnswer:
    """What a helper said.

    Attributes:
        username: the user, "<token>" for an identity token.
        secret: password or token.
        expires_at: seconds since 1970 at which it expires; 0.0 when the helper does not say.
    """

    username: str
    secret: str
    expires_at: float


async def ask_helper(program: Sequence[str], server: str) -> HelperAnswer:
    """Run a helper and return its login.

    Args:
        program: with its arguments.
        server: what the helper is asked for.

    Raises:
        HelperError: it is missing, fails, hangs, or answers nonsense.
    """
    name = program[0].rpartition("/")[2]
    try:
        process = await asyncio.create_subprocess_exec(
            *program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            # Its children hold its output open, so they end with it.
            start_new_session=True,
        )
    except OSError as error:
        raise HelperError(f"{name} cannot be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(HELPER_SECONDS):
            output, _ = await process.communicate(server.encode())
    except TimeoutError as error:
        raise HelperError(f"{name} did not answer in {HELPER_SECONDS:g} seconds") from error
    except OSError as error:
        raise HelperError(f"{name} broke off: {error.strerror}") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        # By the protocol the reason is on standard output, and no login is when it fails.
        words = " ".join(output.decode(errors="replace").split())[:_MAX_WORDS]
        says = f" and says: {words}" if words and "{" not in words else ""
        raise HelperError(f"{name} ended with code {process.returncode}{says}")
    return _read_answer(name, output)


def _read_answer(name: str, output: bytes) -> HelperAnswer:
    try:
        answer = json.loads(output)
        username, secret = answer["Username"], answer["Secret"]
        expires = answer.get("ExpiresAt")
        moment = datetime.fromisoformat(expires) if expires else None
    except (ValueError, KeyError, TypeError, AttributeError):
        # Without "from": the error of the decoder carries the whole text.
        raise HelperError(f"{name} answered something that is not a login") from None
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        raise HelperError(f"{name} answered an empty login")
    if moment is not None and moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return HelperAnswer(username, secret, moment.timestamp() if moment is not None else 0.0)
