"""Which system of continuous integration runs this command.

Sources: the reference pages of predefined variables of each system, see `build/cibranch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.build.cibranch import SYSTEMS
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

CHOICE_VARIABLE = "OFFLOAD_CI"
"""Names the system, or says "none" where none is to be believed."""
GITHUB, GITLAB, BUILDKITE, CIRCLECI, JENKINS, GENERIC = (
    "github", "gitlab", "buildkite", "circleci", "jenkins", "generic",
)  # fmt: skip
KNOWN = (GITHUB, GITLAB, BUILDKITE, CIRCLECI, JENKINS, GENERIC)
_NAMES = {
    "GitHub Actions": GITHUB,
    "GitLab CI": GITLAB,
    "Buildkite": BUILDKITE,
    "CircleCI": CIRCLECI,
    "Jenkins": JENKINS,
}
_NO = ("", "0", "false", "none", "off")


def find_system(environment: Mapping[str, str]) -> str:
    """Return one of `KNOWN`, or "" where a person runs the command.

    Any other system that sets CI, as all do, is "generic".

    Raises:
        UsageError: OFFLOAD_CI names no system.
    """
    choice = environment.get(CHOICE_VARIABLE)
    if choice is not None:
        choice = choice.strip().lower()
        if choice in _NO:
            return ""
        if choice not in KNOWN:
            raise UsageError(
                f'{CHOICE_VARIABLE} is "{choice}"; write one of {", ".join(KNOWN)}, or none'
            )
        return choice
    for system in SYSTEMS:
        if environment.get(system.marker, "").strip().lower() not in _NO:
            return _NAMES.get(system.name, GENERIC)
    return GENERIC if environment.get("CI", "").strip().lower() not in _NO else ""


def in_pipeline(environment: Mapping[str, str]) -> bool:
    """Return whether nobody is there who could answer a question."""
    try:
        return bool(find_system(environment))
    except UsageError:
        # Said by the command that shows progress; a question would wait for ever until then.
        return True
