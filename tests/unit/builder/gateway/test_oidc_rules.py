"""What tokens stand for: presets, patterns, the first rule that matches, forks and branches."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.gateway.cachetrust import BranchBound, CacheMember, CacheTrust, may_promote
from offload_builder.gateway.oidc.patterns import matches
from offload_builder.gateway.oidc.policy import Issuer, Policy, Rule
from offload_builder.gateway.oidc.presets import PRESETS
from offload_builder.gateway.oidc.rules import judge, member_name, run_facts
from offload_builder.gateway.tickets import CacheWish, cache_scopes
from offload_core.errors import AccessDeniedError
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb

TRUST = CacheTrust(("main",), ("main", "release/*"))
GITHUB = {
    "iss": PRESETS["github"].url,
    "sub": "repo:acme/app:ref:refs/heads/main",
    "repository": "acme/app",
    "repository_owner": "acme",
    "ref": "refs/heads/main",
    "ref_type": "branch",
    "ref_protected": "true",
    "event_name": "push",
    "run_id": "42",
}
GITLAB = {
    "iss": "https://gitlab.com",
    "sub": "project_path:acme/app:ref_type:branch:ref:main",
    "project_path": "acme/app",
    "project_id": "7",
    "ref": "main",
    "ref_type": "branch",
    "ref_protected": "true",
    "pipeline_source": "push",
    "job_id": "9",
}
BUILDKITE = {
    "sub": "organization:acme:pipeline:app:ref:refs/heads/main:commit:c:step:s",
    "organization_slug": "acme",
    "pipeline_slug": "app",
    "build_branch": "main",
    "build_number": 5,
    "job_id": "j",
}
CIRCLE = {
    "sub": "org/o/project/p/user/u",
    "oidc.circleci.com/project-id": "p",
    "oidc.circleci.com/vcs-ref": "refs/heads/main",
    "oidc.circleci.com/workflow-id": "w",
}


def issuer(preset="github", **changes):
    url = PRESETS[preset].url if preset else "https://login.example"
    return Issuer("i", url or "https://oidc.circleci.com/org/o", ("a",), preset, **changes)


def facts(preset, claims, **changes):
    return run_facts(issuer(preset), claims | changes)


def rule(name="r", role=identity_pb.ROLE_CI, when=None, **changes):
    when = {"sub": ("**",)} if when is None else when
    return Rule(name, 1, "i", when, changes.pop("unless", {}), role, ("app",), **changes)


def grant_of(claims, *rules, preset="github"):
    return judge(Policy(rules=rules or (rule(),)), issuer(preset), claims).grant


def scopes_of(grant, client_branch="", choice=None):
    """Do as the gateway does for a build of this caller."""
    identity = grant.identity.SerializeToString()
    told = grant.identity
    branch = told.branch if told.bound else client_branch
    member = CacheMember(grant.member, grant.role, BranchBound.of(identity))
    wish = CacheWish(branch, told.target_branch, choice or builds_pb.CacheChoice())
    return cache_scopes("app", member, wish, TRUST)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("acme/*", "acme/app", True),
        ("acme/*", "acme/app/sub", False),
        ("acme/*", "acme-evil/app", False),
        ("acme/**", "acme/app/sub", True),
        ("repo:acme/*:ref:refs/heads/main", "repo:acme/app:ref:refs/heads/main", True),
        ("repo:acme/*:ref:refs/heads/main", "repo:acme/a:environment:b:ref:refs/heads/main", False),
        ("main", "Main", False),
        ("main", "main\n", False),
        ("main", "xmain", False),
        ("a.b", "axb", False),
        ("a[b]", "ab", False),
        ("*@example.com", "eve@evil.example", False),
        ("*@example.com", "a@example.com.evil.example", False),
    ],
)
def test_pattern_matches_what_it_says_and_no_more(pattern, text, expected):
    assert matches(pattern, text) is expected


@given(st.text("a/*:b", max_size=8), st.text("a/:b", max_size=8))
def test_patterns_match_as_the_expression_that_they_stand_for(pattern, text):
    parts = re.split(r"(\*\*|\*)", pattern)
    forms = {"**": ".*", "*": "[^/:]*"}
    expression = "".join(forms.get(part, re.escape(part)) for part in parts)
    assert matches(pattern, text) == (re.fullmatch(expression, text) is not None)


def test_text_that_a_stranger_has_chosen_takes_no_time():
    began = time.thread_time()
    assert not matches("**a**a**a**a**a**b", "a" * 16_000)
    assert not matches("*a*a*a*a*a*b", "a" * 16_000)
    assert time.thread_time() - began < 2.0


def test_run_on_a_protected_branch_of_github():
    told = facts("github", GITHUB)
    assert (told.branch, told.protected, told.pull_request, told.fork) == (
        "main",
        True,
        False,
        False,
    )
    assert told.run_url == "https://github.com/acme/app/actions/runs/42"


def test_pull_request_of_github_has_its_own_branch_and_target():
    told = facts("github", GITHUB, event_name="pull_request", ref="refs/pull/3/merge",
                 head_ref="fix", base_ref="main")  # fmt: skip
    assert (told.branch, told.target_branch, told.pull_request) == ("fix", "main", True)


@pytest.mark.parametrize("event", ["workflow_run", "issue_comment", "pull_request_review", ""])
def test_events_that_may_build_proposals_are_taken_for_such(event):
    assert facts("github", GITHUB, event_name=event).pull_request


def test_tag_has_no_branch():
    assert facts("github", GITHUB, ref="refs/tags/v1", ref_type="tag").branch == ""
    assert facts("gitlab", GITLAB, ref="main", ref_type="tag").branch == ""
    assert facts("buildkite", BUILDKITE, build_tag="v1").branch == ""
    assert facts("circleci", CIRCLE, **{"oidc.circleci.com/vcs-ref": "refs/tags/v1"}).branch == ""


def test_merge_request_of_gitlab():
    told = facts("gitlab", GITLAB, pipeline_source="merge_request_event", ref="fix",
                 target_ref="main", ref_protected="false")  # fmt: skip
    assert (told.branch, told.target_branch, told.pull_request, told.fork) == (
        "fix", "main", True, False
    )  # fmt: skip
    assert told.run_url == "https://gitlab.com/acme/app/-/jobs/9"


@pytest.mark.parametrize(
    ("preset", "claims", "changes"),
    [
        ("github", GITHUB, {"event_name": "pull_request_target"}),
        ("gitlab", GITLAB, {"job_project_path": "acme/parent"}),
        ("gitlab", GITLAB, {"source_project_id": "8"}),
        ("buildkite", BUILDKITE, {"build_branch": "eve:main"}),
        ("circleci", CIRCLE, {"oidc.circleci.com/vcs-ref": "refs/heads/pull/3"}),
        ("circleci", CIRCLE, {"oidc.circleci.com/vcs-ref": "refs/pull/3/head"}),
    ],
)
def test_fork_that_claims_a_protected_branch_is_untrusted_and_writes_its_own_scope(
    preset, claims, changes
):
    grant = grant_of(claims | changes, preset=preset)
    assert grant.role == identity_pb.ROLE_UNTRUSTED
    assert "fork" in grant.lowered
    assert not grant.identity.protected_branch
    scopes = scopes_of(grant, "main")
    assert scopes.write.startswith("app/~untrusted-")
    assert scopes.trust_domain.startswith("untrusted-")
    wish = builds_pb.CacheChoice(scope="main")
    assert scopes_of(grant, choice=wish).write.startswith("app/~untrusted-")


def test_forks_have_scopes_of_their_own():
    writes = {
        scopes_of(grant_of(BUILDKITE | {"build_branch": branch}, preset="buildkite")).write
        for branch in ("eve:main", "mallory:main", "eve:fix")
    }
    assert len(writes) == 3


def test_protected_branch_is_written_by_its_own_run_only():
    assert scopes_of(grant_of(GITHUB)).write == "app/main"
    assert scopes_of(grant_of(GITHUB)).trust_domain == "protected"
    for changes in (
        {"ref_protected": "false"},
        {"ref_protected": None},
        {"event_name": "workflow_run"},
    ):
        scopes = scopes_of(grant_of(GITHUB | changes))
        assert (scopes.write, scopes.trust_domain) == ("", "")


def test_client_that_names_another_branch_builds_the_proven_one():
    grant = grant_of(GITHUB | {"ref": "refs/heads/fix"})
    assert scopes_of(grant, client_branch="main").write == "app/fix"
    with pytest.raises(AccessDeniedError, match="does not prove"):
        scopes_of(grant, choice=builds_pb.CacheChoice(scope="main"))


def test_run_of_one_protected_branch_does_not_write_another():
    grant = grant_of(GITHUB | {"ref": "refs/heads/release/1"})
    assert scopes_of(grant).write == "app/release%2F1"
    with pytest.raises(AccessDeniedError, match="does not prove"):
        scopes_of(grant, choice=builds_pb.CacheChoice(scope="main"))


def test_pull_request_writes_neither_its_target_nor_a_default_branch():
    claims = GITHUB | {"event_name": "pull_request", "head_ref": "main", "base_ref": "release/1"}
    grant = grant_of(claims)
    assert grant.role == identity_pb.ROLE_MEMBER
    assert scopes_of(grant).write == ""
    trust = CacheTrust(("main",), ())
    member = CacheMember("m", grant.role, BranchBound.of(grant.identity.SerializeToString()))
    assert cache_scopes("app", member, CacheWish("main", ""), trust).write == ""


def test_promotion_to_a_protected_branch_needs_a_run_on_it():
    def member(claims):
        grant = grant_of(claims)
        return CacheMember("m", grant.role, BranchBound.of(grant.identity.SerializeToString()))

    assert may_promote(member(GITHUB), "fix", "main", TRUST) == ("fix", "main")
    with pytest.raises(AccessDeniedError, match="does not prove"):
        may_promote(member(GITHUB | {"ref": "refs/heads/fix"}), "fix", "main", TRUST)
    with pytest.raises(AccessDeniedError, match="only administrators"):
        may_promote(member(GITHUB | {"event_name": "pull_request"}), "fix", "main", TRUST)


def test_job_with_a_shell_for_people_does_not_write_a_protected_branch():
    claims = CIRCLE | {"oidc.circleci.com/ssh-rerun": True}
    assert scopes_of(grant_of(claims, preset="circleci")).write == ""


def test_first_rule_that_matches_holds_and_the_others_say_why():
    first = rule("first", when={"repository": ("acme/other",)})
    excluded = rule("excluded", unless={"ref": ("refs/heads/*",)})
    forks = rule("forks", fork=True)
    second, third = rule("second", identity_pb.ROLE_MEMBER), rule("third")
    verdict = judge(Policy(rules=(first, excluded, forks, second, third)), issuer(), GITHUB)
    assert verdict.rule is second
    assert verdict.grant.role == identity_pb.ROLE_MEMBER
    whys = [why for _, why in verdict.passed_over]
    assert whys[0] == 'repository is "acme/app", not "acme/other"'
    assert "excludes" in whys[1]
    assert whys[2] == "this is not a run of a fork"


def test_missing_claim_matches_nothing():
    verdict = judge(Policy(rules=(rule(when={"environment": ("prod",)}),)), issuer(), GITHUB)
    assert verdict.grant is None
    assert verdict.passed_over[0][1] == "the token has no claim environment"


def test_claims_that_are_lists_numbers_or_nested():
    claims = {"sub": "u", "groups": ["a", "b"], "n": 7, "x": {"y": "z"}, "ok": True}
    for when in ({"groups": ("b",)}, {"n": ("7",)}, {"x.y": ("z",)}, {"ok": ("true",)}):
        assert grant_of(claims, rule(when=when), preset="")
    for when in ({"groups": ("a, b",)}, {"x": ("z",)}):
        assert grant_of(claims, rule(when=when), preset="") is None


def test_address_that_is_not_verified_matches_nothing():
    when = {"email": ("*@example.com",)}
    claims = {"sub": "u", "email": "a@example.com"}
    assert grant_of(claims | {"email_verified": True}, rule(when=when), preset="")
    assert grant_of(claims | {"email_verified": False}, rule(when=when), preset="") is None


def test_names_of_members_never_coincide():
    names = [
        member_name("i", text, role)
        for text in ("acme/app-x", "acme-app/x", "acme-app-x", "a" * 200, "a" * 201)
        for role in (identity_pb.ROLE_CI, identity_pb.ROLE_UNTRUSTED)
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 64 for name in names)
    assert member_name("i", "alice@example.com", identity_pb.ROLE_MEMBER) == "i+alice@example.com"


def test_project_of_a_template_must_be_a_project():
    wanted = rule(when={"sub": ("**",)})
    wanted = Rule("r", 1, "i", wanted.when, {}, identity_pb.ROLE_CI, ("{repository:last}",))
    assert grant_of(GITHUB, wanted).projects == ("app",)
    for name in ("acme/..", "acme/A", "acme/", "acme/*"):
        with pytest.raises(AccessDeniedError, match="cannot be the name of a project"):
            grant_of(GITHUB | {"repository": name}, wanted)


def test_issuer_without_a_branch_binds_nothing():
    grant = grant_of({"sub": "alice"}, rule(role=identity_pb.ROLE_MEMBER), preset="")
    assert not grant.identity.bound
    assert scopes_of(grant, client_branch="fix").write == "app/fix"
