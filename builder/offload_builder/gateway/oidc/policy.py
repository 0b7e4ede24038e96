"""Issuers and rules as an administrator wrote them, checked. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.gateway.oidc.presets import PRESETS, Preset

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offload_proto.v1 import identity_service_pb2 as identity_pb

ALLOWED_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Signatures with a key pair only: with a shared secret, whoever can verify can also sign."""

DEFAULT_ALGORITHMS = ("RS256", "ES256")
REPLAY = ("once", "until-expiry")
ALL_PROJECTS = "*"


@dataclass(frozen=True)
class Issuer:
    """One identity provider. Times in seconds.

    Attributes:
        name: in rules and in the names of members.
        url: exactly as in the `iss` claim.
        audiences: a token must be made for these and for no others.
        preset: name of the kind of pipelines; empty for any other provider.
        jwks_url: of the keys; empty to ask the discovery document.
        ca_file: certificates that vouch for the issuer instead of the system's.
        algorithms: signatures that are taken.
        clock_skew: how far clocks may be apart.
        max_token_age: from its `iat` on.
        replay: "once", or "until-expiry" where one token serves several commands.
        certificate_lifetime: bound of the certificates.
        claims: templates of the facts of a run, for issuers without a preset.
        client_id: of our client, when people log in here.
        scopes: that people's clients ask for.
    """

    name: str
    url: str
    audiences: tuple[str, ...]
    preset: str = ""
    jwks_url: str = ""
    ca_file: Path | None = None
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
    clock_skew: float = 60.0
    max_token_age: float = 86_400.0
    replay: str = "until-expiry"
    certificate_lifetime: float = 3600.0
    claims: Mapping[str, str] = field(default_factory=dict)
    client_id: str = ""
    scopes: tuple[str, ...] = ()

    @property
    def known(self) -> Preset | None:
        """The preset, None without one."""
        return PRESETS.get(self.preset)


@dataclass(frozen=True)
class Rule:
    """What the tokens of an issuer that fulfil some conditions stand for.

    Attributes:
        name: for people and logs.
        line: in the file.
        issuer: name of the issuer.
        when: patterns by claim; of each claim one pattern must match.
        unless: patterns by claim; none may match.
        fork: what the run must be; None for either. So `pull_request`.
        protected: the run must (not) be on a branch that its issuer calls protected.
        role: of the member.
        projects: templates; `*` for all.
        member: template of the member's name; empty for that of the issuer.
    """

    name: str
    line: int
    issuer: str
    when: Mapping[str, tuple[str, ...]]
    unless: Mapping[str, tuple[str, ...]]
    role: identity_pb.Role.ValueType
    projects: tuple[str, ...]
    fork: bool | None = None
    pull_request: bool | None = None
    protected: bool | None = None
    member: str = ""


@dataclass(frozen=True)
class Policy:
    """Everything that one file says; without issuers nobody logs in this way."""

    issuers: Mapping[str, Issuer] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    audience: str = ""
    """What pipelines ask a token for."""
    person: Issuer | None = None
    """Where people prove who they are."""

    def issuer_of(self, url: str) -> Issuer | None:
        """Return the issuer with exactly this URL."""
        return next((item for item in self.issuers.values() if item.url == url), None)
