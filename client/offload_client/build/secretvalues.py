"""The values of --secret, read when the node asks for them.

Source: BuildKit's session/secrets/secretsprovider.
"""

from __future__ import annotations

import stat
import threading
from typing import TYPE_CHECKING

from offload_core.errors import ContextError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.build.secretoptions import SecretOption
    from offload_client.invocation import Invocation

MAX_BYTES = 500 * 1024
"""BuildKit's MaxSecretSize."""


class SecretValues:
    """Where the secrets of one build come from; their values stay in the memory of this object.

    A value is read once: a pipe gives it once, and a node that is asked for the build again after
    a lost connection asks for its secrets again.
    """

    def __init__(self, invocation: Invocation, secrets: Sequence[SecretOption]) -> None:
        """Look whether they can be had.

        Raises:
            InvalidValueError: a file is missing or too large.
        """
        self._invocation = invocation
        self._secrets = {secret.id: self._located(secret) for secret in secrets}
        self._values: dict[str, bytes] = {}
        self._reading = {secret.id: threading.Lock() for secret in secrets}

    @property
    def ids(self) -> list[str]:
        """Names of the secrets."""
        return list(self._secrets)

    def __repr__(self) -> str:
        return f"SecretValues({self.ids})"

    def read(self, secret_id: str) -> bytes | None:
        """Return a secret; None if there is none of this name. Blocks: the file may be a pipe.

        Raises:
            ContextError: it cannot be read; the message never has the value.
        """
        if secret_id not in self._secrets:
            return None
        # A node that comes back may ask while the pipe is still being read for the first time.
        with self._reading[secret_id]:
            value = self._values.get(secret_id)
            if value is None:
                value = self._values[secret_id] = self._read(self._secrets[secret_id])
        return value

    def forget(self) -> None:
        """Let go of all values."""
        self._values.clear()

    def _located(self, secret: SecretOption) -> SecretOption:
        from dataclasses import replace

        if not secret.path and not secret.variable:
            in_environment = secret.id in self._invocation.environment
            given = {"variable": secret.id} if in_environment else {"path": secret.id}
            secret = replace(secret, **given)
        if secret.path:
            self._check_file(secret)
        return secret

    def _check_file(self, secret: SecretOption) -> None:
        path = self._invocation.path(secret.path)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not a path"
            raise InvalidValueError(
                f"secret {secret.id}: failed to stat {secret.path}: {why.lower()}"
            ) from error
        if stat.S_ISDIR(status.st_mode):
            raise InvalidValueError(f"secret {secret.id}: {secret.path} is a directory")
        if status.st_size > MAX_BYTES:
            raise InvalidValueError(f"secret {secret.id} too big. max size 500KiB")

    def _read(self, secret: SecretOption) -> bytes:
        if secret.variable:
            # As with docker, a variable that is not set is an empty secret.
            text = self._invocation.environment.get(secret.variable, "")
            value = text.encode("utf-8", "surrogateescape")
        else:
            try:
                with self._invocation.path(secret.path).open("rb") as file:
                    value = file.read(MAX_BYTES + 1)
            except OSError as error:
                raise ContextError(
                    f"secret {secret.id}: cannot read {secret.path}: {error.strerror}"
                ) from error
        if len(value) > MAX_BYTES:
            raise ContextError(f"secret {secret.id} too big. max size 500KiB")
        return value
