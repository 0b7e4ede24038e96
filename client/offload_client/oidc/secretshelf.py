"""Private keys and refresh tokens in the keyring of the operating system, where there is one.

Needs the extra `keyring`; without it, without a keyring that can be used, or with
OFFLOAD_KEYRING=off, secrets stay in a file that only the user can read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from offload_core.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "offload-build"
SWITCH = "OFFLOAD_KEYRING"


def put_secret(environment: Mapping[str, str], name: str, secret: str) -> bool:
    """Keep a secret in the keyring; False when there is none, or it refuses."""
    keyring = _keyring(environment)
    if keyring is None:
        return False
    try:
        keyring.set_password(SERVICE, name, secret)
    except Exception:  # noqa: BLE001 - each keyring has its own errors; the file is always there
        return False
    return True


def take_secret(name: str) -> str:
    """Return a secret of the keyring.

    Raises:
        AuthenticationError: it cannot be had.
    """
    try:
        import keyring

        secret = keyring.get_password(SERVICE, name)
    except Exception as error:
        raise AuthenticationError(
            f"the keyring does not give the key of your login: {type(error).__name__}",
            hint="unlock it, or log in again",
        ) from error
    if secret is None:
        raise AuthenticationError("the key of your login is no longer in the keyring")
    return secret


def remove_secret(name: str) -> None:
    """Delete a secret; harmless when it is not there."""
    with contextlib.suppress(Exception):
        import keyring

        keyring.delete_password(SERVICE, name)


def _keyring(environment: Mapping[str, str]) -> Any:
    if "off" in (environment.get(SWITCH), os.environ.get(SWITCH)) or environment.get("CI"):
        return None
    if importlib.util.find_spec("keyring") is None:
        return None
    try:
        import keyring

        # The one that stands in where there is none has the priority 0.
        usable = keyring.get_keyring().priority >= 1
    except Exception:  # noqa: BLE001 - each keyring has its own errors
        return None
    return keyring if usable else None
