"""The ways of the node itself to registries for builds.

The node is outside of the firewall, so it asks the policy before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import BUILT_IN
from offload_builder.egress.policy.targets import parse_server
from offload_builder.egress.urls.locations import OddSourceError, image_at
from offload_builder.egress.urls.urlpolicy import address_in
from offload_core.errors import AccessDeniedError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.egress.policy.model import Address, Verdict
    from offload_builder.egress.urls.urlpolicy import UrlPolicy
    from offload_cache.mirror.connection import Endpoint

CONNECTED = "reached through a connector, which the node itself cannot use"


class RegistryJudge:
    """Judges repositories, and all connections on the way to them.

    Redirects, places of uploads and token services of a registry are hosts as any other.

    Args:
        policy: returns what holds now.
        tell: hears of each refusal: host, address, port, and why. The host is empty where an
            address was asked for, and the address where it is not known.
        local: hosts and ports that may lie on the node itself.
    """

    def __init__(
        self,
        policy: Callable[[], UrlPolicy],
        tell: Callable[[str, str, int, Verdict], None],
        local: frozenset[tuple[str, int]] = frozenset(),
    ) -> None:
        self._policy = policy
        self._tell = tell
        self._local = local

    def check(self, host: str, repository: str) -> None:
        """Check a repository, before anything is looked up.

        Args:
            host: as image names begin.
            repository: without the host.

        Raises:
            AccessDeniedError: the policy does not allow it.
        """
        try:
            place = image_at(host, repository)
        except OddSourceError as error:
            raise AccessDeniedError(f"egress: {host} was refused: {error}") from error
        if self._policy().connected(place.host):
            raise AccessDeniedError(
                f"egress: {host} is {CONNECTED}", hint="have the build itself push, with --push"
            )
        verdict = self._policy().verdict(place)
        if not self._passes(verdict, place.host, place.port):
            reason = self._told(place.host, None, place.port, verdict)
            raise AccessDeniedError(f"egress: {host}/{repository} was refused: {reason}")

    def __call__(self, host: str, address: Address | None, port: int, /) -> str:
        """Judge a connection, as `offload_cache.mirror.judging.Judge` says."""
        try:
            name, _ = parse_server(f"[{host}]" if ":" in host else host)
        except InvalidValueError as error:
            return error.message
        if self._policy().connected(name):
            return f"it is {CONNECTED}"
        verdict = self._policy().connection(name, address, port)
        if self._passes(verdict, name, port):
            return ""
        return self._told(name, address, port, verdict)

    def _told(self, host: str, address: Address | None, port: int, verdict: Verdict) -> str:
        """Tell of a refusal, and return why it was."""
        literal = address_in(host)
        found = address or literal
        self._tell(host if literal is None else "", str(found or ""), port, verdict)
        text = f"rule {verdict.rule_id}: {verdict.rule_text}, {verdict.place}"
        return f"{verdict.reason} ({text})"

    def _passes(self, verdict: Verdict, host: str, port: int) -> bool:
        if verdict.allowed:
            return True
        protected = verdict.place == BUILT_IN and verdict.rule_id.startswith("protected-")
        return protected and (host, port) in self._local


@dataclass(frozen=True, slots=True)
class RegistryAccess:
    """Where registries are that the node pushes to.

    Attributes:
        endpoint_of: returns where a registry is.
        judge: decides what is allowed, also on the way; None for everything.
    """

    endpoint_of: Callable[[str], Endpoint]
    judge: RegistryJudge | None = None

    def endpoint(self, host: str, repository: str) -> Endpoint:
        """Return where a registry is.

        Args:
            host: as image names begin.
            repository: that is pushed to.

        Raises:
            AccessDeniedError: the policy does not allow it.
        """
        if self.judge is not None:
            self.judge.check(host, repository)
        return self.endpoint_of(host)
