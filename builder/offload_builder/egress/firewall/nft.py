"""nftables of the namespace that the thread is in: libnftables in this process, or the program nft.

In process a change of one element takes 0.2 ms; a process for it would take 3 to 13 ms.
"""

from __future__ import annotations

import ctypes
import subprocess
from typing import Protocol

from offload_core.errors import ConfigError, InternalError

_SECONDS = 60.0
_LIBRARIES = ("libnftables.so.1", "libnftables.so")
_MAX_MESSAGE = 600


class Nft(Protocol):
    """Does changes of the rules of one namespace, each call as a whole or not at all."""

    def apply(self, text: str) -> str:
        """Do changes in nft's language, in one transaction; return what nft printed.

        Raises:
            InternalError: nft refused them; nothing has changed.
        """
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class LibNft:
    """libnftables. Make it and use it in one thread, which is in the namespace.

    Raises:
        ConfigError: there is no libnftables.
    """

    def __init__(self) -> None:
        self._library = _load()
        self._context: int | None = self._library.nft_ctx_new(0)
        if not self._context:
            raise ConfigError("libnftables could not be set up")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def apply(self, text: str) -> str:
        """Do changes; see `Nft`."""
        failed = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        # Both are read each time: reading is what empties them.
        output = self._library.nft_ctx_get_output_buffer(self._context) or b""
        errors = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            raise InternalError(_refusal(errors.decode(errors="replace")))
        return str(output.decode(errors="replace"))

    def close(self) -> None:
        """Give its memory back."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None


class NftProgram:
    """The program nft, for machines without libnftables."""

    def apply(self, text: str) -> str:
        """Do changes; see `Nft`."""
        try:
            done = subprocess.run(
                ["nft", "-f", "-"],
                input=text,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise ConfigError("nft was not found", hint="install nftables") from None
        except subprocess.TimeoutExpired as error:
            raise InternalError(f"nft did not end within {_SECONDS:g} seconds") from error
        if done.returncode != 0:
            raise InternalError(_refusal(done.stderr))
        return done.stdout

    def close(self) -> None:
        """Do nothing: there is no process between calls."""


def open_nft() -> Nft:
    """Return the way to nftables that this machine has; see `LibNft` about the thread."""
    try:
        return LibNft()
    except ConfigError:
        return NftProgram()


def _refusal(errors: str) -> str:
    text = " ".join(errors.split())
    return f"nftables refused a change: {text[:_MAX_MESSAGE]}"


def _load() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for function in (
            library.nft_ctx_buffer_output,
            library.nft_ctx_buffer_error,
            library.nft_ctx_free,
        ):
            function.argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for function in (library.nft_ctx_get_output_buffer, library.nft_ctx_get_error_buffer):
            function.argtypes = [ctypes.c_void_p]
            function.restype = ctypes.c_char_p
        return library
    raise ConfigError("libnftables was not found", hint="install libnftables1 or nftables")
