"""What requests of BuildKit's clients mean in our terms, and what BuildKit is asked instead."""

from __future__ import annotations

import json
import time

import pytest

from offload_builder.buildkit.controlapi import (
    SolveOrder,
    frontend_attributes,
    limited_prune,
    named_imports,
    read_order,
    rewrite_frontend_call,
    rewrite_order,
)
from offload_builder.buildkit.solve import Attributed
from offload_builder.node.proxy.admission import Guest
from offload_builder.node.proxy.policy import NETWORK_POLICY, bounded, wish_of
from offload_builder.node.proxy.records import CHANGE_HISTORY, PRUNE, permitted
from offload_builder.node.steplimits import StepBounds
from offload_core.errors import AccessDeniedError, UsageError
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit import gateway_pb2 as gateway

OURS = Attributed("registry", {"ref": "127.0.0.1:5/cap/cache:import"})
THEIRS = Attributed("registry", {"ref": "r.example/app:cache"})


def order(**values):
    return SolveOrder("ref", **values)


def guest(role="member", domain=""):
    return Guest(b"", "shop", "ann", role, domain)


def test_a_build_is_described_by_its_parameters():
    wish = wish_of(
        order(
            attributes={
                "filename": "Dockerfile.app", "target": "run",
                "platform": "linux/amd64,linux/arm64",
                "no-cache": "", "build-arg:X": "1", "build-arg:OFFLOAD_BRANCH": "feature/x",
                "build-arg:OFFLOAD_TARGET_BRANCH": "main", "vcs:revision": "abc",
            },
            exporters=(Attributed("image", {"name": "shop/app:1,shop/app:2"}),),
        ),
        "buildx",
    )  # fmt: skip
    create, spec = wish.create, wish.spec
    assert (create.name, create.client, create.target) == ("shop/app:1", "buildx", "run")
    assert list(create.platforms) == ["linux/amd64", "linux/arm64"]
    assert (create.vcs_branch, create.vcs_target_branch) == ("feature/x", "main")
    assert create.vcs_revision == "abc"
    assert spec.no_cache
    assert dict(spec.build_args) == {"X": "1"}


def test_kinds_of_the_pool_choose_its_scopes_and_do_not_reach_buildkit():
    wish = wish_of(
        order(
            cache_imports=(Attributed("offload", {"scope": "feature/y"}), THEIRS),
            cache_exports=(Attributed("none", {}), THEIRS),
            attributes={"cache-imports": json.dumps([{"Type": "registry", "Attrs": THEIRS[1]}])},
        ),
        "buildx",
    )
    assert list(wish.create.cache.read_scopes) == ["feature/y"]
    assert wish.create.cache.write_off
    assert wish.imports == (THEIRS,)
    assert wish.exports == (THEIRS,)


@pytest.mark.parametrize(
    "entry",
    [Attributed("s3", {"bucket": "b"}), Attributed("what", {}), Attributed("registry", {})],
)
def test_caches_that_would_use_the_nodes_keys_are_refused(entry):
    with pytest.raises(UsageError):
        wish_of(order(cache_imports=(entry,)), "buildx")
    with pytest.raises(UsageError):
        wish_of(order(cache_exports=(entry,)), "buildx")


def test_nothing_and_a_scope_at_once_contradict_each_other():
    entries = (Attributed("none", {}), Attributed("offload", {"scope": "x"}))
    with pytest.raises(UsageError):
        wish_of(order(cache_imports=entries), "buildx")


def test_parameters_get_the_nodes_bounds_and_lose_ours():
    bounds = StepBounds(max_memory_bytes=64 << 20)
    found = bounded(
        {"filename": "D", "build-arg:OFFLOAD_BRANCH": "x", "cgroup-parent": "/mine"}, bounds
    )
    assert found == {
        "filename": "D", "memory": str(64 << 20), "cgroup-parent": "/offload/mine"
    }  # fmt: skip
    with pytest.raises(UsageError):
        bounded({"memory": str(128 << 20)}, bounds)
    with pytest.raises(UsageError):
        bounded({"memory": "lots"}, bounds)
    with pytest.raises(UsageError):
        bounded({"cgroup-parent": "../../system.slice"}, bounds)


def test_a_solve_keeps_what_has_no_name_here():
    request = control.SolveRequest(Ref="r", Session="s", Entitlements=["network.host"])
    request.Cache.Imports.add(Type="registry", Attrs=THEIRS[1])
    request.Cache.ImportRefsDeprecated.append("old.example/cache")
    # Field 12 is the source policy.
    raw = request.SerializeToString() + b"\x62\x03abc"
    assert read_order(raw).cache_imports == (
        Attributed("registry", {"ref": "old.example/cache"}), THEIRS,
    )  # fmt: skip
    changed = rewrite_order(
        raw, ref="q", attributes={"a": "b"}, imports=[OURS], exports=[THEIRS], entitlements=[]
    )
    assert b"\x62\x03abc" in changed
    found = read_order(changed)
    assert (found.ref, found.session, found.entitlements) == ("q", "s", ())
    assert (found.cache_imports, found.cache_exports) == ((OURS,), (THEIRS,))
    assert found.attributes == {"a": "b"}


def test_a_frontend_gets_caches_as_a_parameter_and_a_definition_as_a_list():
    call = gateway.SolveRequest(Frontend="dockerfile.v0", FrontendOpt={"cache-from": "x"})
    raw = rewrite_frontend_call(
        call.SerializeToString(), attributes={"cache-from": "x", "a": "b"}, imports=[OURS]
    )
    found = frontend_attributes(raw)
    assert found["a"] == "b"
    assert "cache-from" not in found
    assert named_imports(found) == [OURS]
    raw = rewrite_frontend_call(b"", attributes={}, imports=[OURS])
    message = gateway.SolveRequest.FromString(raw)
    assert [item.Type for item in message.CacheImports] == ["registry"]
    assert not message.FrontendOpt


@pytest.mark.parametrize("text", ["{", "[1]", '[{"Attrs":{}}]', '{"a":1}'])
def test_caches_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError):
        named_imports({"cache-imports": text})


def test_broken_requests_are_refused():
    for read in (read_order, frontend_attributes):
        with pytest.raises(UsageError):
            read(b"\xff\xff")


def test_a_members_prune_spares_a_week_and_an_administrators_does_not():
    request = control.PruneRequest(all=True).SerializeToString()
    spared = control.PruneRequest.FromString(permitted(PRUNE, request, guest(), []))
    assert spared.all
    assert spared.keepDuration == 7 * 86_400 * 10**9
    assert permitted(PRUNE, request, guest("admin"), []) == request
    assert permitted(PRUNE, request, guest("untrusted", "untrusted-ann"), []) == request
    longer = control.PruneRequest(keepDuration=10**18).SerializeToString()
    assert limited_prune(longer, 60) == longer


def test_records_of_others_cannot_be_removed():
    request = control.UpdateBuildHistoryRequest(Ref="x", Delete=True).SerializeToString()
    with pytest.raises(AccessDeniedError):
        permitted(CHANGE_HISTORY, request, guest(), ["y"])
    assert permitted(CHANGE_HISTORY, request, guest(), ["x"]) == request
    assert permitted(CHANGE_HISTORY, request, guest("admin"), []) == request
    finalize = control.UpdateBuildHistoryRequest(Ref="x").SerializeToString() + b"\x20\x01"
    assert permitted(CHANGE_HISTORY, finalize, guest(), []) == finalize


@pytest.mark.parametrize("kind", ["registry", "offload"])
def test_a_request_with_many_caches_is_refused_at_once(kind):
    entries = tuple(Attributed(kind, {"ref": str(i), "scope": f"s{i}"}) for i in range(20_000))
    began = time.process_time()
    with pytest.raises(UsageError, match="caches"):
        wish_of(order(cache_imports=entries), "buildx")
    assert time.process_time() - began < 0.5


def test_parameters_have_a_bounded_size():
    many = {"platform": "linux/amd64," * 100_000}
    with pytest.raises(UsageError, match="characters"):
        wish_of(order(attributes=many), "buildx")
    with pytest.raises(UsageError, match="characters"):
        bounded(many, StepBounds(0, 0))


def test_a_network_policy_is_refused_rather_than_ignored():
    wanted = order(frontend="dockerfile.v0", attributes={NETWORK_POLICY: "none"})
    with pytest.raises(UsageError, match="OFFLOAD_NETWORK_POLICY is for offload-build"):
        wish_of(wanted, "buildx")
