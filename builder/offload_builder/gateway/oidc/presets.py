"""What four systems of continuous integration say of a run in the claims of their tokens.

Sources: the reference pages of OpenID Connect of GitHub Actions, GitLab CI/CD (ID tokens),
Buildkite (`buildkite-agent oidc request-token`) and CircleCI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from offload_builder.gateway.oidc.patterns import claim_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GITHUB_TRUSTED_EVENTS = frozenset(
    {"push", "schedule", "workflow_dispatch", "repository_dispatch", "release", "create"}
)
"""Events that build what the repository has accepted; all others may build a proposal."""

_CIRCLE = "oidc.circleci.com/"
_CIRCLE_FORK = re.compile(r"refs/(?:heads/)?pull/\d+(?:/.*)?")


@dataclass(frozen=True)
class RunFacts:
    """What a token proves about the run of a pipeline.

    Attributes:
        member: what the member's name is made of.
        branch: that is built; empty for none, for example a tag.
        target_branch: of the pull request; empty when unknown or none.
        pull_request: it builds, or may build, what nobody has accepted yet.
        fork: the code comes, or may come, from a fork.
        protected: whether the branch is protected there; None when the issuer does not say it.
        run_url: page of the run for people.
        bound: the branch is proven; False for people and issuers that name none.
        fork_name: tells the forks apart, as far as the issuer does.
    """

    member: str
    branch: str = ""
    target_branch: str = ""
    pull_request: bool = False
    fork: bool = False
    protected: bool | None = None
    run_url: str = ""
    bound: bool = True
    fork_name: str = ""


@dataclass(frozen=True)
class Preset:
    """What is known of an issuer.

    Attributes:
        url: of the issuer that everybody shares; empty when each organisation has its own.
        replay: how often one token may be used unless configured.
        facts: reads claims; the second argument is the issuer's URL.
        anchors: claims that say whose run it is, each with what a pattern must begin with so that
            strangers at the shared issuer cannot match it.
    """

    url: str
    replay: str
    facts: Callable[[dict[str, Any], str], RunFacts]
    anchors: Mapping[str, re.Pattern[str]] = field(default_factory=dict)


def plain_branch(ref: str) -> str:
    """Return the branch of a git reference; empty for tags and what else is none."""
    if ref.startswith("refs/heads/"):
        return ref.removeprefix("refs/heads/")
    return "" if ref.startswith("refs/") else ref


def _github(claims: dict[str, Any], issuer: str) -> RunFacts:
    def get(name: str) -> str:
        return claim_text(claims, name)

    event, repository, run = get("event_name"), get("repository"), get("run_id")
    pull_request = event not in GITHUB_TRUSTED_EVENTS
    server = issuer.removesuffix("/_services/token")
    if server.startswith("https://token.actions.githubusercontent.com"):
        server = "https://github.com"
    branch = get("head_ref") or get("ref")
    return RunFacts(
        member=repository,
        branch="" if get("ref_type") == "tag" else plain_branch(branch),
        target_branch=plain_branch(get("base_ref")),
        pull_request=pull_request,
        # The one event of proposals from forks that gets a token without being asked.
        fork=event == "pull_request_target",
        fork_name=f"{get('actor_id')}:{get('head_ref')}",
        protected=get("ref_protected") == "true",
        run_url=f"{server}/{quote(repository)}/actions/runs/{quote(run)}" if run else "",
    )


def _gitlab(claims: dict[str, Any], issuer: str) -> RunFacts:
    def get(name: str) -> str:
        return claim_text(claims, name)

    project, job = get("project_path"), get("job_id")
    # Where a merge request of a fork runs in the project itself, these name the two.
    places = [("job_project_path", "project_path"), ("job_project_id", "project_id")]
    places += [("source_project_path", "project_path"), ("source_project_id", "project_id")]
    shown = get("job_project_path") or project
    return RunFacts(
        member=project,
        branch=plain_branch(get("ref")) if get("ref_type") == "branch" else "",
        target_branch=plain_branch(get("target_ref")),
        pull_request=get("pipeline_source")
        in ("merge_request_event", "external_pull_request_event"),
        fork=any(get(one) and get(one) != get(other) for one, other in places),
        protected=get("ref_protected") == "true",
        run_url=f"{issuer}/{quote(shown)}/-/jobs/{quote(job)}" if job else "",
    )


def _buildkite(claims: dict[str, Any], issuer: str) -> RunFacts:  # noqa: ARG001
    def get(name: str) -> str:
        return claim_text(claims, name)

    pipeline = f"{get('organization_slug')}/{get('pipeline_slug')}"
    branch, number = get("build_branch"), get("build_number")
    # A colon stands in no branch of git; Buildkite sets it behind the owner of a fork.
    fork = ":" in branch
    job = f"#{quote(get('job_id'))}" if get("job_id") else ""
    return RunFacts(
        member=pipeline,
        branch="" if get("build_tag") or fork else branch,
        fork_name=branch,
        pull_request=fork,
        fork=fork,
        run_url=f"https://buildkite.com/{quote(pipeline)}/builds/{quote(number)}{job}"
        if number
        else "",
    )


def _circleci(claims: dict[str, Any], issuer: str) -> RunFacts:  # noqa: ARG001
    def get(name: str) -> str:
        return claim_text(claims, _CIRCLE + name)

    ref, workflow = get("vcs-ref"), get("workflow-id")
    fork = _CIRCLE_FORK.fullmatch(ref) is not None
    # Somebody with a shell in the job can do there what no branch has accepted.
    by_hand = get("ssh-rerun") == "true"
    return RunFacts(
        member=get("project-id"),
        branch="" if fork else plain_branch(ref),
        fork_name=ref,
        pull_request=fork or by_hand,
        fork=fork,
        protected=False if by_hand else None,
        run_url=f"https://app.circleci.com/pipelines/workflows/{quote(workflow)}"
        if workflow
        else "",
    )


_WHOLE = re.compile(r"[^*]+$")
_OWNER = re.compile(r"[^*/]+/")

PRESETS: Mapping[str, Preset] = {
    "github": Preset(
        "https://token.actions.githubusercontent.com",
        "once",
        _github,
        {
            "repository": _OWNER,
            "repository_id": _WHOLE,
            "repository_owner": _WHOLE,
            "repository_owner_id": _WHOLE,
            "enterprise": _WHOLE,
            "enterprise_id": _WHOLE,
            "sub": re.compile(r"repo:[^*/:]+/"),
        },
    ),
    "gitlab": Preset(
        "https://gitlab.com",
        "until-expiry",
        _gitlab,
        {
            "project_path": _OWNER,
            "project_id": _WHOLE,
            "namespace_path": re.compile(r"[^*/]+(?:/|$)"),
            "namespace_id": _WHOLE,
            "sub": re.compile(r"project_path:[^*/:]+/"),
        },
    ),
    "buildkite": Preset(
        "https://agent.buildkite.com",
        "once",
        _buildkite,
        {
            "organization_slug": _WHOLE,
            "organization_id": _WHOLE,
            "pipeline_id": _WHOLE,
            "sub": re.compile(r"organization:[^*:]+:pipeline:"),
        },
    ),
    "circleci": Preset("", "until-expiry", _circleci),
}
