"""Build contexts that are not on this machine, and paths that are of another kind of machine.

Source: what buildx takes for a URL (build/utils.go), and BuildKit's util/gitutil and
frontend/dockerfile/dfgitutil.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit, urlunsplit

from offload_client.build.options import check_text
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from offload_client.invocation import Invocation

_SCP_STYLE = re.compile(r"[a-zA-Z0-9_-]+@[a-zA-Z0-9.-]+:.*", re.DOTALL)
_HTTP = ("http://", "https://")
_BARE_GITHUB = "github.com/"
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\|\.{1,2}\\")


def is_http_url(text: str) -> bool:
    """Return whether a text is the URL of a file."""
    return text.startswith(_HTTP)


def is_remote(text: str) -> bool:
    """Return whether a text means a git repository or a file on another machine."""
    return (
        is_http_url(text)
        or text.startswith(_BARE_GITHUB)
        or text.lower().startswith("git://")
        or is_git_over_ssh(text)
    )


def is_git_over_ssh(text: str) -> bool:
    """Return whether a text means a git repository that is fetched with an SSH key."""
    return text.lower().startswith("ssh://") or _SCP_STYLE.fullmatch(text) is not None


def check_remote(text: str, what: str) -> str:
    """Return a URL for the node to fetch from.

    Raises:
        InvalidValueError: it cannot be fetched.
    """
    check_text(what, text)
    if any(char < " " or char == "\x7f" for char in text):
        raise InvalidValueError(f"{what} has a control character in its URL")
    return text


def refuse_windows_path(invocation: Invocation, text: str, what: str) -> None:
    """Refuse a path as Windows has them.

    Raises:
        InvalidValueError: it is one, and this machine has no file of that name.
    """
    if _WINDOWS.match(text) and not invocation.path(text).exists():
        raise InvalidValueError(
            f'{what} "{text}" is a Windows path, but this machine is not a Windows machine; '
            "write it with /"
        )


def remote_definition(url: str, dockerfile: str) -> str:
    """Return a name for a build that is the same for every revision and user of its repository.

    Revision, credentials and signatures in the URL do not count; the directory does.
    """
    if url.startswith(_BARE_GITHUB):
        url = f"https://{url}"
    try:
        parts = urlsplit(url)
        directory = parts.fragment.partition(":")[2] or parse_qs(parts.query).get("subdir", [""])[0]
        host = parts.netloc.rpartition("@")[2].lower()
        base = urlunsplit((parts.scheme.lower(), host, parts.path, "", ""))
    except ValueError:
        base, directory = url, ""
    return "\0".join((base, posixpath.normpath(f"/{directory}"), posixpath.normpath(dockerfile)))
