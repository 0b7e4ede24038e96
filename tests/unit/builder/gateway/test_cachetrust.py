"""Which cache scopes a build reads and writes, and what else identity decides about the cache."""

from __future__ import annotations

import itertools

import pytest

from offload_builder.gateway.cachetrust import (
    CacheMember,
    CacheTrust,
    Level,
    check_scope_name,
    may_promote,
    may_prune,
    scope_id,
    scope_name,
)
from offload_builder.gateway.tickets import CacheScopes, CacheWish, cache_scopes
from offload_cache.keys import contributions_prefix, used_key
from offload_core.errors import AccessDeniedError, OffloadError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2 import CacheChoice

ADMIN = CacheMember("root", identity_pb.ROLE_ADMIN)
ANN = CacheMember("ann", identity_pb.ROLE_MEMBER)
CI = CacheMember("ci", identity_pb.ROLE_CI)
EVE = CacheMember("eve", identity_pb.ROLE_UNTRUSTED)
OPEN = CacheTrust(("main", "master"), ())
GUARDED = CacheTrust(("main", "master"), ("main", "release-*"))


def scopes(
    member: CacheMember, branch: str = "", target: str = "", trust: CacheTrust = OPEN, **choice
) -> CacheScopes:
    wish = CacheWish(branch, target, CacheChoice(**choice))
    found = cache_scopes("shop", member, wish, trust)
    assert all(name.startswith("shop/") for name in found.read)
    return CacheScopes(
        tuple(name.removeprefix("shop/") for name in found.read),
        found.write.removeprefix("shop/"),
        found.trust_domain,
    )


# -- order


def test_branch_reads_itself_then_target_then_defaults_then_the_team() -> None:
    found = scopes(ANN, "feature/x", "develop")
    assert found.read == ("feature%2Fx", "develop", "main", "master", "~team")
    assert (found.write, found.trust_domain) == ("feature%2Fx", "")


def test_named_scopes_are_read_before_all_others_and_each_once() -> None:
    found = scopes(ANN, "x", read_scopes=["main", "y", "x"])
    assert found.read == ("main", "y", "x", "master", "~team")


def test_build_without_a_branch_shares_the_scope_of_the_team() -> None:
    assert scopes(ANN).write == "~team"


def test_pinned_scope_stands_for_the_branch() -> None:
    found = scopes(ANN, "x", scope="nightly")
    assert (found.read[0], found.write) == ("nightly", "nightly")
    assert "x" not in found.read


def test_nothing_is_read_or_written_where_it_is_not_wanted() -> None:
    assert scopes(CI, "main", trust=GUARDED, read_off=True) == CacheScopes((), "main", "protected")
    off = scopes(CI, "main", trust=GUARDED, write_off=True)
    assert off == CacheScopes(("main",), "", "protected")


# -- who may write


@pytest.mark.parametrize("branch", ["main", "release-1"])
def test_protected_branch_is_written_by_administrators_and_pipelines_only(branch: str) -> None:
    assert scopes(ANN, branch, trust=GUARDED).write == ""
    assert scopes(CI, branch, trust=GUARDED).write == branch
    assert scopes(ADMIN, branch, trust=GUARDED).write == branch


@pytest.mark.parametrize("member", [ANN, CI, ADMIN])
@pytest.mark.parametrize("branch", ["main", "master", "release-1", "develop"])
def test_pull_request_never_writes_its_target_a_default_or_a_protected_branch(
    member: CacheMember, branch: str
) -> None:
    found = scopes(member, branch, "develop", GUARDED)
    assert (found.write, found.trust_domain) == ("", "")
    with pytest.raises(AccessDeniedError):
        scopes(member, "topic", "develop", GUARDED, scope=branch)


def test_pull_request_of_a_pipeline_writes_its_branch_in_the_domain_of_members() -> None:
    found = scopes(CI, "topic", "main", GUARDED)
    assert (found.write, found.trust_domain) == ("topic", "")


def test_pinned_protected_scope_is_refused_unless_it_is_only_read() -> None:
    with pytest.raises(AccessDeniedError, match="only administrators and pipelines"):
        scopes(ANN, "x", trust=GUARDED, scope="main")
    found = scopes(ANN, "x", trust=GUARDED, scope="main", write_off=True)
    assert (found.read[0], found.write) == ("main", "")
    assert scopes(CI, "x", trust=GUARDED, scope="main").trust_domain == "protected"


def test_untrusted_member_writes_only_below_its_own_name() -> None:
    found = scopes(EVE, "main", "main", GUARDED)
    assert (found.write, found.trust_domain) == ("~untrusted-eve", "untrusted-eve")
    assert found.read == ("~untrusted-eve", "main", "master", "~team")
    pinned = scopes(EVE, "main", trust=GUARDED, scope="main")
    assert pinned.write == pinned.read[0] == "~untrusted-eve%2Fmain"


# -- who may read


def test_build_of_a_protected_branch_reads_protected_scopes_only() -> None:
    found = scopes(CI, "release-1", trust=GUARDED, read_scopes=["release-0"])
    assert found.read == ("release-0", "release-1", "main")
    with pytest.raises(AccessDeniedError, match="not protected"):
        scopes(CI, "main", trust=GUARDED, read_scopes=["topic"])


def test_default_branch_that_is_not_protected_is_no_source_for_a_protected_one() -> None:
    trust = CacheTrust(("main",), ("release-*",))
    assert scopes(CI, "release-1", trust=trust).read == ("release-1",)
    assert scopes(CI, "main", trust=trust).trust_domain == ""


def test_without_protected_branches_all_members_trust_each_other() -> None:
    for member in (ANN, CI, ADMIN):
        found = scopes(member, "main")
        assert (found.write, found.trust_domain) == ("main", "")
        assert "~team" in found.read


def test_pattern_for_everything_covers_builds_without_a_branch() -> None:
    everything = CacheTrust(("main",), ("*",))
    assert scopes(ANN, trust=everything).write == ""
    found = scopes(CI, "x", trust=everything)
    assert found == CacheScopes(("x", "main", "~team"), "x", "protected")


def test_content_never_moves_up_a_level() -> None:
    names = ["", "main", "master", "release-1", "topic", "develop"]
    choices = [{}, *({"scope": name} for name in names[1:])]
    choices += [{"read_scopes": [name]} for name in names[1:]]
    checked = 0
    for trust, member, branch, target, choice in itertools.product(
        (OPEN, GUARDED), (ADMIN, ANN, CI, EVE), names, names, choices
    ):
        try:
            found = scopes(member, branch, target, trust, **choice)
        except AccessDeniedError:
            continue
        checked += 1
        if not found.write:
            continue
        own = trust.level(scope_name(f"shop/{found.write}"))
        assert all(trust.level(scope_name(f"shop/{name}")) >= own for name in found.read)
        domain = {Level.PROTECTED: "protected", Level.MEMBER: "", Level.UNTRUSTED: "untrusted-eve"}
        assert found.trust_domain == domain[own]
        assert target == "" or found.write not in (target, *trust.default_branches)
    assert checked > 1000


# -- names

TRICKS = [
    "../main", "main/../main", "/main", "main/", "a//b", "~team", "~untrusted-eve", "a~b",
    "main\x00", "main\n", "ma in", "\u00a0main", "a\\b", "a:b", "*", "x" * 501, "@{-1}", "", ".." ,
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_scope_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_scope_name(name)
    with pytest.raises(UsageError):
        scopes(CI, "x", trust=GUARDED, read_scopes=[name])
    if name:
        for member in (ANN, CI, EVE):
            with pytest.raises(UsageError):
                scopes(member, "x", trust=GUARDED, scope=name)


@pytest.mark.parametrize("branch", ["~team", "~untrusted-eve", "a~b", "a\x00", "x" * 501])
def test_branch_that_could_be_a_scope_of_ours_is_refused(branch: str) -> None:
    for wish in ({"branch": branch}, {"target": branch}):
        with pytest.raises(UsageError):
            scopes(ANN, **wish)


@pytest.mark.parametrize(
    "branch",
    ["../main", "%2e%2e/main", "%6dain", "main/../main", "refs/heads/main", "MAIN", "m\u0430in",
     "\uff4dain", "main ", "./main", "main%00"],
)  # fmt: skip
def test_branch_that_looks_like_main_is_another_scope(branch: str) -> None:
    found = scopes(ANN, branch, trust=GUARDED).write
    assert found not in ("", "main")
    assert "/" not in found
    prefix = contributions_prefix("shop", f"shop/{found}")
    assert prefix.count("/") == 4
    assert prefix != contributions_prefix("shop", "shop/main")


def test_every_branch_has_a_scope_that_fits_into_a_key_and_is_its_own() -> None:
    names = [
        "x" * 200,
        "x" * 300,
        "x" * 300 + "y",
        "\u65e5" * 200,
        "\u65e5" * 201,
        "a/" * 100 + "b",
    ]
    found = {scope_id("p" * 40, name) for name in names}
    assert len(found) == len(names)
    for scope in found:
        used_key("p" * 40, scope, "k")


def test_wishes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot read"):
        scopes(ANN, "x", read_off=True, read_scopes=["y"])
    with pytest.raises(UsageError, match="at most"):
        scopes(ANN, "x", read_scopes=[f"s{number}" for number in range(17)])


# -- promote and prune


def test_promotion_is_for_those_who_may_write_the_target() -> None:
    assert may_promote(CI, "topic", "", GUARDED) == ("topic", "main")
    assert may_promote(ADMIN, "~team", "nightly", GUARDED) == ("~team", "nightly")
    for member in (ANN, EVE):
        with pytest.raises(AccessDeniedError):
            may_promote(member, "topic", "nightly", GUARDED)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("~untrusted-eve", "main"), ("~untrusted-eve/x", "topic"), ("topic", "~untrusted-eve"),
        ("main", "main"), ("../main", "main"), ("topic", "~other"), ("", "main"),
    ],
)  # fmt: skip
def test_promotion_from_or_to_somewhere_else_is_refused(source: str, target: str) -> None:
    with pytest.raises(OffloadError):
        may_promote(ADMIN, source, target, GUARDED)


def test_member_prunes_what_it_may_write_and_an_administrator_everything() -> None:
    for name in ("", "main", "~untrusted-eve", "xx~abc"):
        may_prune(ADMIN, name, GUARDED)
    may_prune(ANN, "topic", GUARDED)
    may_prune(ANN, "~team", GUARDED)
    may_prune(CI, "main", GUARDED)
    may_prune(EVE, "~untrusted-eve", GUARDED)
    may_prune(EVE, "~untrusted-eve/x", GUARDED)
    refused = [
        (ANN, ""), (CI, ""), (ANN, "main"), (ANN, "~untrusted-eve"), (ANN, "xx~abc"),
        (EVE, "topic"), (EVE, "~team"), (EVE, "~untrusted-evelyn"), (EVE, "main"),
    ]  # fmt: skip
    for member, name in refused:
        with pytest.raises(AccessDeniedError):
            may_prune(member, name, GUARDED)
