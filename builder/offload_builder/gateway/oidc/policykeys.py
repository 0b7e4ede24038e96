"""The keys of `identity.toml`, in one place for its reader and for the documentation."""

from __future__ import annotations

from dataclasses import dataclass

from offload_builder.gateway.oidc.policy import ALLOWED_ALGORITHMS, DEFAULT_ALGORITHMS
from offload_builder.gateway.oidc.presets import PRESETS

ROLES = ("admin", "member", "ci", "untrusted")


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        kind: type of its value in TOML.
        form: of the value, for people.
        about: one sentence.
        default: for people; empty when there is none.
    """

    kind: type | tuple[type, ...]
    form: str
    about: str
    default: str = ""


TOP_KEYS = {
    "audience": Key(str, "text", "What tokens of pipelines must be made for; clients learn it."),
    "issuer": Key(dict, "tables", "One table [issuer.NAME] for each identity provider."),
    "rule": Key(list, "tables", "One table [[rule]] for each rule; the first that matches holds."),
}
ISSUER_KEYS = {
    "preset": Key(str, "text", f"Kind of pipelines: {', '.join(PRESETS)}.", "none"),
    "url": Key(str, "URL", "Exactly the iss claim; https, or http on this machine.", "preset's"),
    "audience": Key(
        (str, list), "text or list", "What tokens must be made for.", "`audience`, `client_id`"
    ),
    "client_id": Key(str, "text", "Our client there; people log in at this issuer.", "none"),
    "scopes": Key(
        list, "list of texts", "Scopes that people's clients ask for.",
        "`openid`, `profile`, `email`, `offline_access`",
    ),
    "jwks_url": Key(str, "URL", "Place of the keys.", "from the discovery document"),
    "ca_file": Key(str, "path", "PEM certificates that vouch for the issuer's.", "the system's"),
    "algorithms": Key(
        list, "list of texts", f"Signatures that are taken, of {', '.join(ALLOWED_ALGORITHMS)}.",
        ", ".join(f"`{name}`" for name in DEFAULT_ALGORITHMS),
    ),
    "clock_skew": Key(str, "duration", "How far clocks may be apart, at most 5m.", "`60s`"),
    "max_token_age": Key(str, "duration", "How old a token may be by its iat claim.", "`24h`"),
    "replay": Key(
        str, "text", "Use of one token: once, or until-expiry for several commands of a job.",
        "`once` for github and buildkite, else `until-expiry`",
    ),
    "certificate_lifetime": Key(
        str, "duration", "Longest life of a certificate, at most 24h.", "`1h`"
    ),
    "claims": Key(
        dict, "table", "For issuers without a preset: facts of a run as templates, see below.",
    ),
}  # fmt: skip
RULE_KEYS = {
    "name": Key(str, "text", "Shown to people and in the log; unique."),
    "issuer": Key(str, "text", "Name of the issuer."),
    "when": Key(dict, "table", "Patterns by claim; each claim named must match one of its own."),
    "unless": Key(dict, "table", "Patterns by claim; a match of any keeps the rule out.", "none"),
    "fork": Key(bool, "true or false", "Only runs of forks, or only others.", "either"),
    "pull_request": Key(bool, "true or false", "Only pull requests, or only others.", "either"),
    "protected": Key(
        bool, "true or false", "Only branches that the issuer says are protected.", "either"
    ),
    "role": Key(str, "text", f"One of {', '.join(ROLES)}; admin for people only."),
    "projects": Key(list, "list of texts", 'Projects that may be used; templates, "*" for all.'),
    "member": Key(str, "template", "What the member is called after.", "preset's, or `{sub}`"),
}
