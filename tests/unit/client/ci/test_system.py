"""Systems of continuous integration are known by their variables."""

from __future__ import annotations

import pytest

from offload_client.ci.system import find_system, in_pipeline
from offload_core.errors import UsageError


@pytest.mark.parametrize(
    ("environment", "system"),
    [
        ({"GITHUB_ACTIONS": "true", "CI": "true"}, "github"),
        ({"GITLAB_CI": "true", "CI": "true"}, "gitlab"),
        ({"BUILDKITE": "true", "CI": "true"}, "buildkite"),
        ({"CIRCLECI": "true", "CI": "true"}, "circleci"),
        ({"JENKINS_URL": "https://ci.example/"}, "jenkins"),
        ({"TF_BUILD": "True"}, "generic"),
        ({"CI": "true"}, "generic"),
        ({"CI": "1"}, "generic"),
        ({"CI": "false"}, ""),
        ({"CI": ""}, ""),
        ({"GITHUB_ACTIONS": "false"}, ""),
        ({}, ""),
        ({"OFFLOAD_CI": "gitlab", "GITHUB_ACTIONS": "true"}, "gitlab"),
        ({"OFFLOAD_CI": "none", "GITHUB_ACTIONS": "true", "CI": "true"}, ""),
    ],
)
def test_system_is_found(environment: dict[str, str], system: str) -> None:
    assert find_system(environment) == system
    assert in_pipeline(environment) is bool(system)


def test_unknown_choice_is_refused_and_nobody_is_asked() -> None:
    with pytest.raises(UsageError, match="OFFLOAD_CI"):
        find_system({"OFFLOAD_CI": "hudson"})
    assert in_pipeline({"OFFLOAD_CI": "hudson"})
