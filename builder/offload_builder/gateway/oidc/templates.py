"""Texts with claims in braces: `{repository}`, and `{repository:last}` for what follows the last /.

A claim in braces that is missing, or has several values, makes the whole text empty: half a name
is the name of somebody else.
"""

from __future__ import annotations

import re
from typing import Any

from offload_builder.gateway.oidc.patterns import claim_text
from offload_core.errors import ConfigError

FACT_NAMES = (
    "member", "branch", "target_branch", "pull_request", "fork", "protected", "run_url",
)  # fmt: skip
"""What the claims of an issuer without a preset can be said to mean."""

_FIELD = re.compile(r"\{([^{}]+?)(:last)?\}")


def check_template(template: Any) -> None:
    """Refuse what is no template.

    Raises:
        ConfigError: with what is wrong.
    """
    if not isinstance(template, str) or not template:
        raise ConfigError("a template is a text such as {sub}")
    if re.search(r"[{}]", _FIELD.sub("", template)):
        raise ConfigError(f'the braces in "{template[:60]}" do not match; write {{claim}}')


def fill(template: str, claims: dict[str, Any]) -> str:
    """Return a template with the values of its claims; empty when one has none."""
    empty = False

    def value(field: re.Match[str]) -> str:
        nonlocal empty
        text = claim_text(claims, field[1])
        if field[2]:
            text = text.rpartition("/")[2]
        empty = empty or not text
        return text

    text = _FIELD.sub(value, template)
    return "" if empty else text
