"""Keeps containers with a route of their own from running where rules name URLs.

The server of an allowed URL is open to the project's BuildKit as a whole, and BuildKit's proxy is
what looks at paths. Steps of a proxied build have no other way. But BuildKit also starts containers
that it does not put behind its proxy: frontend images, those that frontends start by themselves,
and steps of builds that began under a policy without the proxy.

Sources: BuildKit's executor/runcexecutor (`Meta.Proxy`), util/network/proxyprovider and cniprovider
for the paths of namespaces, frontend/gateway for what runs without it.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SHELL = r"""
# Inside texts of the file every quotation mark has a backslash, so only the object itself matches.
if [ -n "$bundle" ] && [ -e {flag} ] && ! LC_ALL=C grep -Eq \
    '\{{"type":"network"(,"path":"[^"]*/net/proxy/[^"/]+")?\}}' "$bundle/config.json"; then
    echo {sentence} >&2
    exit 1
fi
"""
_SENTENCE = (
    "egress: this container has a network beside BuildKit's proxy, which the policy's rules by URL "
    "do not allow (a frontend image with a network, or a build that began before there were such "
    "rules: start it again)"
)


class RouteGuard:
    """Of one BuildKit; closed while a policy allows URLs.

    Args:
        flag: a file that is there while it is closed; in a directory that steps cannot write to.
    """

    def __init__(self, flag: Path) -> None:
        self._flag = flag.absolute()

    @property
    def shell(self) -> str:
        """What the program in runc's place does before a step; see `write_runc_wrapper`."""
        return _SHELL.format(flag=shlex.quote(str(self._flag)), sentence=shlex.quote(_SENTENCE))

    def set(self, *, closed: bool) -> None:
        """Close or open it; containers that run already stay as they are.

        Raises:
            OSError: the file cannot be made or removed.
        """
        if closed:
            self._flag.parent.mkdir(parents=True, exist_ok=True)
            self._flag.touch(mode=0o600)
        else:
            self._flag.unlink(missing_ok=True)
