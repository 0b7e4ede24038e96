"""Why a registry did not do what a build wanted, in a sentence with what to do.

BuildKit's messages name a host and end in the words of Go's network and TLS packages, or in the
status that the registry answered (containerd's core/remotes). The sentence is added to them.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.failure import NOT_ALLOWED
from offload_cache.mirror.upstream import DOCKER_HUB, origin_address
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.node.logins import BuildLogins
    from offload_cache.mirror.images import BaseImages

_URL = re.compile(r"https?://([^/\s\"]+)(/[^\s\"]*)?")
_FORBIDDEN = re.compile(r"403 Forbidden|denied|insufficient_scope", re.IGNORECASE)
_UNAUTHORIZED = re.compile(
    r"401 Unauthorized|failed to authorize|no basic auth|authorization failed"
    r"|authentication required|missing username or secret|failed to find supported auth scheme",
    re.IGNORECASE,
)
_GO = re.compile(r"dial tcp (?P<host>[^\s:]+:\d+): |lookup (?P<name>[\w.-]+)(?: on \S+)?: ")
_GIT = re.compile(
    r"Failed to connect to (?P<host>\S+)|connect to host (?P<name>\S+)|ssh: Could not resolve"
    r" hostname (?P<ssh>[^\s:]+)|Could not resolve host: (?P<https>[^\s:]+)"
)
"""Where hosts are named beside a URL: by Go's network package, by git and by ssh."""
_KEYS_REFUSED = re.compile(r"(?:[\w.-]+@(?P<host>[\w.-]+): )?Permission denied \(publickey")
_NO_GIT_LOGIN = re.compile(
    r"could not read (?:Username|Password) for '\w+://(?:[^@/']*@)?(?P<host>[^/']+)"
    r"|Authentication failed for '\w+://(?:[^@/']*@)?(?P<name>[^/']+)"
)
_FAULTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"x509: certificate signed by unknown authority|x509: .*not trusted"),
        (
            "the node does not trust the certificate of {host}; its administrator can name the"
            " authority with `ca` in the registry's table of registry_config"
        ),
    ),
    (
        re.compile(r"x509: certificate has expired|x509: .*not yet valid"),
        "the certificate of {host} is not valid at this time; renew it, or set the node's clock",
    ),
    (
        re.compile(r"x509: "),
        "the certificate of {host} is not good for this name; check the name, or renew it",
    ),
    (
        re.compile(r"server gave HTTP response to HTTPS client"),
        (
            "{host} speaks plain HTTP; if that is meant, its administrator can set `http = true`"
            " in the registry's table of registry_config"
        ),
    ),
    (
        re.compile(
            r"no such host|server misbehaving|name resolution|lookup .*i/o timeout"
            r"|Could not resolve host"
        ),
        "the node cannot find {host} in DNS; check its spelling, and the DNS of the node",
    ),
    (
        re.compile(
            r"connection refused|network is unreachable|no route to host"
            r"|Couldn't connect to server",
            re.IGNORECASE,
        ),
        (
            "{host} is down or not reachable from the node; check its address and"
            " port, or build again when it is up"
        ),
    ),
    (
        re.compile(
            r"i/o timeout|TLS handshake timeout|deadline exceeded|Client\.Timeout"
            r"|Connection timed out",
            re.IGNORECASE,
        ),
        ("{host} does not answer; check that the node can reach it, or build again when it is up"),
    ),
    (
        re.compile(r"50[0234] |too many requests|toomanyrequests|429 "),
        "{host} fails or has too many requests; build again later",
    ),
)
REFUSED = "egress: "
"""Begin of the causes that are the policy's word."""


class Whose(enum.Enum):
    """Whose login was used."""

    PERSON = "your login"
    POOL = "the pool's login"
    NOBODY = "no login"


@dataclass(frozen=True, slots=True)
class RegistryTrouble:
    """What a build knows of its last question to a registry.

    Attributes:
        host: of the registry, as BuildKit names it.
        repository: that was asked for; empty when it is not known.
        whose: login that was used.
        user: its name; may be empty.
        cause: what went wrong before the registry was asked; empty for nothing.
        denied: the login is the cause, and not a service that does not answer.
    """

    host: str
    repository: str
    whose: Whose
    user: str = ""
    cause: str = ""
    denied: bool = True

    def __str__(self) -> str:
        """One or two sentences for people."""
        place = f"{self.host}/{self.repository}" if self.repository else self.host
        shown = _shown(self.host)
        target = "" if shown == DOCKER_HUB else f" {shown}"
        if self.cause.startswith(REFUSED):
            return f"{self.cause}; the login at {shown} was not possible"
        if self.cause and not self.denied:
            return (
                f"the login at {shown} was not possible: {self.cause}; check that the node can"
                " reach its token service, or build again later"
            )
        if self.whose is Whose.NOBODY and self.cause and "token service" not in self.cause:
            return (
                f"{self.cause}; log in yourself with `docker login{target}`, or ask the pool's"
                " administrator"
            )
        if self.whose is Whose.NOBODY:
            return (
                f"{place} needs a login and there is none: use `docker login{target}`, or ask the"
                " pool's administrator for a login in registry_config"
            )
        if self.whose is Whose.PERSON:
            user = f" as {self.user}" if self.user and self.user != "<token>" else ""
            return (
                f"{shown} refused your login{user} for {self.repository or 'this image'}: log in"
                f" again with `docker login{target}`, and check the name and your rights"
            )
        return (
            f"{shown} refused the pool's login for {self.repository or 'this image'}; ask the"
            " pool's administrator, or log in yourself with"
            f" `docker login{target}`"
        )


def explain(message: str, troubles: Sequence[RegistryTrouble]) -> tuple[str, bool] | None:
    """Return a sentence for a build that failed at a registry, and whether a login is the cause.

    Args:
        message: BuildKit's words.
        troubles: what the build knows of its logins.
    """
    for trouble in troubles:
        if str(trouble) in message:
            return str(trouble), trouble.denied
    url = _URL.search(message)
    host = url[1].rpartition("@")[2] if url is not None else ""
    if git := _git_login(message):
        return git, False
    if not host and (place := _GO.search(message) or _GIT.search(message)):
        host = next(filter(None, place.groups()))
    refused = _UNAUTHORIZED.search(message) or (url and _FORBIDDEN.search(message))
    if refused:
        for trouble in reversed(troubles):
            if _concerns(trouble, message, host):
                return str(trouble), trouble.denied
    for pattern, sentence in _FAULTS:
        if host and pattern.search(message):
            return sentence.format(host=host), False
    if refused and host:
        return str(RegistryTrouble(host, "", Whose.NOBODY)), True
    return None


def _git_login(message: str) -> str:
    """Return a sentence for a git server that wants to know who asks; empty for others."""
    if refused := _KEYS_REFUSED.search(message):
        server = refused["host"] or "the git server"
        return f"{server} refused all keys that were forwarded; give another: --ssh default=KEY"
    if (asked := _NO_GIT_LOGIN.search(message)) is not None:
        host = asked["host"] or asked["name"]
        return (
            f"the repository at {host} is not there or needs a login: give a token with"
            f" --secret id=GIT_AUTH_TOKEN.{host},env=NAME"
        )
    return ""


def _shown(host: str) -> str:
    """Return the name that people have for a registry."""
    return DOCKER_HUB if host == origin_address(DOCKER_HUB) else host


def _concerns(trouble: RegistryTrouble, message: str, host: str) -> bool:
    names = {trouble.host, _shown(trouble.host)}
    if host and host not in names:
        return False
    named = not trouble.repository or trouble.repository in message
    return named and any(name in message for name in names)


def explain_failure(failure: Failure, logins: BuildLogins, bases: BaseImages | None) -> None:
    """Add to a failure what to do about a registry, and why a base image could not be had.

    Args:
        failure: of a build; one of a process, or by the egress policy, is left as it is.
        logins: of the build.
        bases: base images that come through the node; None for none.
    """
    if failure.process_exit_code or NOT_ALLOWED in failure.message:
        return
    known = explain(failure.message, logins.troubles)
    if known is not None and failure.kind in (Failure.KIND_BUILD, Failure.KIND_REGISTRY_AUTH):
        sentence, denied = known
        if sentence not in failure.message:
            failure.message += f"\n{sentence}"
        failure.kind = Failure.KIND_REGISTRY_AUTH if denied else Failure.KIND_BUILD
        return
    trouble = bases.explain(failure.message) if bases is not None else None
    if trouble is not None:
        failure.message += f"\n{trouble}"
        if trouble.denied and not logins.given:
            failure.kind = Failure.KIND_REGISTRY_AUTH
