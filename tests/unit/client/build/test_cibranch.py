"""The branch of a pipeline's build, and that of its pull request's target."""

from __future__ import annotations

import pytest

from offload_client.build.cibranch import SYSTEMS, build_branches, ci_branches

GITHUB = {"GITHUB_ACTIONS": "true", "GITHUB_REF_NAME": "7/merge"}
GITLAB = {"GITLAB_CI": "true", "CI_COMMIT_REF_NAME": "topic"}
BUILDKITE = {"BUILDKITE": "true", "BUILDKITE_BRANCH": "topic"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("", "")),
        ({"BRANCH_NAME": "x", "GITHUB_BASE_REF": "main", "GITHUB_ACTIONS": "false"}, ("", "")),
        ({**GITHUB, "GITHUB_HEAD_REF": "topic", "GITHUB_BASE_REF": "main"}, ("topic", "main")),
        ({**GITHUB, "GITHUB_REF_NAME": "main", "GITHUB_BASE_REF": ""}, ("main", "")),
        ({**GITHUB, "GITHUB_REF_NAME": "v1", "GITHUB_REF_TYPE": "tag"}, ("", "")),
        ({**GITLAB, "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}, ("topic", "main")),
        ({**GITLAB, "CI_COMMIT_REF_NAME": "v1", "CI_COMMIT_TAG": "v1"}, ("", "")),
        (
            {
                **BUILDKITE,
                "BUILDKITE_PULL_REQUEST": "12",
                "BUILDKITE_PULL_REQUEST_BASE_BRANCH": "main",
            },
            ("topic", "main"),
        ),
        (
            {
                **BUILDKITE,
                "BUILDKITE_PULL_REQUEST": "false",
                "BUILDKITE_PULL_REQUEST_BASE_BRANCH": "main",
            },
            ("topic", ""),
        ),
        ({"CIRCLECI": "true", "CIRCLE_BRANCH": "topic"}, ("topic", "")),
        ({"CIRCLECI": "true", "CIRCLE_BRANCH": "x", "CIRCLE_TAG": "v1"}, ("", "")),
        ({"TF_BUILD": "True", "BUILD_SOURCEBRANCH": "refs/heads/a/b"}, ("a/b", "")),
        ({"TF_BUILD": "True", "BUILD_SOURCEBRANCH": "refs/tags/v1"}, ("", "")),
        (
            {
                "TF_BUILD": "True",
                "BUILD_SOURCEBRANCH": "refs/pull/3/merge",
                "SYSTEM_PULLREQUEST_SOURCEBRANCH": "refs/heads/topic",
                "SYSTEM_PULLREQUEST_TARGETBRANCH": "refs/heads/main",
            },
            ("topic", "main"),
        ),
        (
            {
                "BITBUCKET_BUILD_NUMBER": "3",
                "BITBUCKET_BRANCH": "topic",
                "BITBUCKET_PR_DESTINATION_BRANCH": "main",
            },
            ("topic", "main"),
        ),
        (
            {
                "JENKINS_URL": "https://ci",
                "BRANCH_NAME": "PR-3",
                "CHANGE_BRANCH": "topic",
                "CHANGE_TARGET": "main",
            },
            ("topic", "main"),
        ),
        ({"JENKINS_URL": "https://ci", "GIT_BRANCH": "origin/main"}, ("main", "")),
    ],
)
def test_each_system_tells_branch_and_target(
    environment: dict[str, str], expected: tuple[str, str]
) -> None:
    assert ci_branches(environment) == expected


def test_checked_out_branch_holds_and_a_detached_head_takes_the_systems() -> None:
    assert build_branches("mine", {**GITLAB}) == ("mine", "")
    assert build_branches("", {**GITLAB}) == ("topic", "")


def test_own_variables_hold_above_all_also_when_they_are_empty() -> None:
    environment = {**GITHUB, "GITHUB_HEAD_REF": "topic", "GITHUB_BASE_REF": "main"}
    own = {"OFFLOAD_BRANCH": "b", "OFFLOAD_TARGET_BRANCH": "t"}
    assert build_branches("git", {**environment, **own}) == ("b", "t")
    none = {"OFFLOAD_BRANCH": "", "OFFLOAD_TARGET_BRANCH": ""}
    assert build_branches("git", {**environment, **none}) == ("", "")
    assert build_branches("git", own) == ("b", "t")


def test_every_system_has_a_marker_of_its_own() -> None:
    assert len({system.marker for system in SYSTEMS}) == len(SYSTEMS)
