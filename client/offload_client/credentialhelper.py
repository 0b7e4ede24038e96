"""Asking one of docker's credential helpers for a login.

Source: the docker-credential-helpers project: the server name on stdin of
`docker-credential-NAME get`, a JSON object with Username and Secret on stdout.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from offload_client.eventlog import get_logger
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = get_logger()

SLOW_SECONDS = 1.5
HELPER_SECONDS = 30.0
"""A person may have to type the password of a keychain."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER = "<token>"  # noqa: S105 - the user name with which helpers mark an identity token
_MAX_WORDS = 200
_REMEDY = "log in again, or repair the helper named in docker's config.json"


def ask_helper(name: str, server: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return user and secret, the user empty with an identity token; None for no login.

    What goes wrong is logged as a warning.

    Args:
        name: of the helper, without `docker-credential-`.
        server: what it is asked for.
        environment: of the user's command.

    Raises:
        ConfigError: the name is a path or worse.
    """
    program = f"docker-credential-{name}"
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f'"{name}" in docker\'s config.json is no name of a credential helper')
    path = shutil.which(program, path=environment.get("PATH"))
    if path is None:
        _log.warning("credential_helper.missing", helper=program, registry=server, remedy=_REMEDY)
        return None
    try:
        code, output = _run(path, program, server, environment)
    except subprocess.TimeoutExpired:
        _log.warning(
            "credential_helper.timed_out",
            helper=program,
            registry=server,
            seconds=HELPER_SECONDS,
            remedy=_REMEDY,
        )
        return None
    except OSError as error:
        _log.warning("credential_helper.failed", helper=program, error=error.strerror)
        return None
    if code != 0:
        _tell_failure(program, server, code, output)
        return None
    return _read_answer(program, output)


def _run(path: str, program: str, server: str, environment: Mapping[str, str]) -> tuple[int, bytes]:
    with subprocess.Popen(
        [path, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(environment),
    ) as process:
        try:
            try:
                output, _ = process.communicate(server.encode(), timeout=SLOW_SECONDS)
            except subprocess.TimeoutExpired:
                _log.warning(
                    "credential_helper.slow",
                    helper=program,
                    registry=server,
                    remedy=f"it may wait for you to unlock a keychain; given up after "
                    f"{HELPER_SECONDS:g} s",
                )
                output, _ = process.communicate(timeout=HELPER_SECONDS - SLOW_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
        return process.returncode, output


def _tell_failure(program: str, server: str, code: int, output: bytes) -> None:
    # The protocol prints this sentence on stdout when it simply has no login.
    if b"credentials not found" in output:
        return
    words = " ".join(output.decode(errors="replace").split())[:_MAX_WORDS]
    _log.warning(
        "credential_helper.failed",
        helper=program,
        registry=server,
        code=code,
        # A helper that fails with an answer might show what it should not.
        says=words if words and "{" not in words else "nothing",
        remedy=_REMEDY,
    )


def _read_answer(program: str, output: bytes) -> tuple[str, str] | None:
    try:
        answer = json.loads(output)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        _log.warning("credential_helper.answer_invalid", helper=program)
        return None
    if not secret:
        return None
    return "" if username == _TOKEN_USER else username, secret
