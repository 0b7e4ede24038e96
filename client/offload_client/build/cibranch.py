"""Branch and target branch of a build in continuous integration, from the variables of its system.

Systems check out a commit and no branch, so `.git` does not tell. The variables are believed only
where their system says that it runs: names such as BRANCH_NAME are too common. Sources: the
reference pages of predefined variables of GitHub Actions, GitLab CI, Buildkite, CircleCI, Azure
Pipelines, Bitbucket Pipelines and Jenkins (Branch API plugin).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

BRANCH_VARIABLE = "OFFLOAD_BRANCH"
TARGET_VARIABLE = "OFFLOAD_TARGET_BRANCH"


class System(NamedTuple):
    """One system.

    Attributes:
        name: for people.
        marker: variable that is set, and not "false", where it runs.
        branches: variables of the branch, in this order.
        target: variable of the branch that a pull request is to be merged into.
        tag: variable that is set when a tag is built: then the branch is not known.
        pull_request: variable that must be set for `target` to count; none when empty.
    """

    name: str
    marker: str
    branches: tuple[str, ...]
    target: str = ""
    tag: str = ""
    pull_request: str = ""


SYSTEMS = (
    System(
        "GitHub Actions", "GITHUB_ACTIONS", ("GITHUB_HEAD_REF", "GITHUB_REF_NAME"),
        "GITHUB_BASE_REF",
    ),
    System(
        "GitLab CI", "GITLAB_CI",
        ("CI_MERGE_REQUEST_SOURCE_BRANCH_NAME", "CI_COMMIT_BRANCH", "CI_COMMIT_REF_NAME"),
        "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", tag="CI_COMMIT_TAG",
    ),
    System(
        "Buildkite", "BUILDKITE", ("BUILDKITE_BRANCH",), "BUILDKITE_PULL_REQUEST_BASE_BRANCH",
        tag="BUILDKITE_TAG", pull_request="BUILDKITE_PULL_REQUEST",
    ),
    System("CircleCI", "CIRCLECI", ("CIRCLE_BRANCH",), tag="CIRCLE_TAG"),
    System(
        "Azure Pipelines", "TF_BUILD", ("SYSTEM_PULLREQUEST_SOURCEBRANCH", "BUILD_SOURCEBRANCH"),
        "SYSTEM_PULLREQUEST_TARGETBRANCH",
    ),
    System(
        "Bitbucket Pipelines", "BITBUCKET_BUILD_NUMBER", ("BITBUCKET_BRANCH",),
        "BITBUCKET_PR_DESTINATION_BRANCH", tag="BITBUCKET_TAG",
    ),
    System(
        "Jenkins", "JENKINS_URL", ("CHANGE_BRANCH", "BRANCH_NAME", "GIT_BRANCH"),
        "CHANGE_TARGET", tag="TAG_NAME",
    ),
)  # fmt: skip


def ci_branches(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the branch and the target branch that a system tells; empty for what it does not."""
    for system in SYSTEMS:
        if _set(environment, system.marker):
            return _branch(system, environment), _target(system, environment)
    return "", ""


def build_branches(git_branch: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the branch of a build, and the one that its pull request is to be merged into.

    Args:
        git_branch: that is checked out; empty when none is.
        environment: of the command. OFFLOAD_BRANCH and OFFLOAD_TARGET_BRANCH hold above all; set
            to an empty text they say that there is none.
    """
    branch, target = ci_branches(environment)
    return (
        environment.get(BRANCH_VARIABLE, git_branch or branch).strip(),
        environment.get(TARGET_VARIABLE, target).strip(),
    )


def _set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").strip().lower() not in ("", "false", "0")


def _branch(system: System, environment: Mapping[str, str]) -> str:
    if system.tag and _set(environment, system.tag):
        return ""
    # GitHub's reference name is a tag, or "NUMBER/merge" for what it builds of a pull request.
    if environment.get("GITHUB_REF_TYPE") == "tag" and system.marker == "GITHUB_ACTIONS":
        return ""
    for name in system.branches:
        value = environment.get(name, "").strip()
        if name == "GIT_BRANCH":
            value = value.removeprefix("origin/")
        if value.startswith(("refs/tags/", "refs/pull/")):
            return ""
        if value:
            return value.removeprefix("refs/heads/")
    return ""


def _target(system: System, environment: Mapping[str, str]) -> str:
    if system.pull_request and not _set(environment, system.pull_request):
        return ""
    return environment.get(system.target, "").strip().removeprefix("refs/heads/")
