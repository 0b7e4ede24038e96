"""Which builds of BuildKit's clients leave their export to a solve of the node's own."""

from __future__ import annotations

import pytest

from offload_builder.buildkit.controlapi import SolveOrder
from offload_builder.buildkit.heldsolve import (
    answered_definition,
    held_requests,
    returned_result,
)
from offload_builder.buildkit.solve import Attributed
from offload_builder.node.proxy.laterexport import can_wait
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit import gateway_pb2 as gateway


@pytest.mark.parametrize(
    ("order", "waits"),
    [
        (SolveOrder("a"), True),
        (SolveOrder("a", attributes={"platform": "linux/amd64"}), True),
        (SolveOrder("a", frontend="dockerfile.v0"), False),
        (SolveOrder("a", has_definition=True), False),
        (SolveOrder("a", attributes={"no-cache": ""}), False),
        (SolveOrder("a", attributes={"no-cache": "base"}), False),
        (SolveOrder("a", attributes={"platform": "linux/amd64,linux/arm64"}), False),
        (SolveOrder("a", attributes={"multi-platform": "true"}), False),
        (SolveOrder("a", attributes={"attest:sbom": ""}), False),
    ],
)
def test_builds_whose_only_result_is_seen_before_it_is_made_wait(order, waits):
    assert can_wait(order) is waits


def test_the_held_solve_exports_the_cache_and_nothing_else():
    order = control.SolveRequest(
        Ref="client",
        Session="session",
        FrontendAttrs={"target": "app"},
        Exporters=[control.Exporter(Type="image")],
        ExporterDeprecated="image",
        EnableSessionExporter=True,
        Entitlements=["network.host"],
        Cache=control.CacheOptions(Imports=[control.CacheOptionsEntry(Type="local")]),
    )
    policy = b"\x62\x02\x08\x01"  # field 12, which has no name here
    call = gateway.SolveRequest(Frontend="dockerfile.v0", FrontendOpt={"target": "app"})
    export = Attributed("registry", {"ref": "r"})
    held = held_requests(
        order.SerializeToString() + policy, call.SerializeToString(), b"\x0a\x01x", [export]
    )
    solve = control.SolveRequest.FromString(held.solve)
    assert solve.Ref == held.ref != "client"
    assert solve.Session == "session"
    assert solve.Internal
    assert list(solve.Entitlements) == ["network.host"]
    assert not solve.Exporters
    assert not solve.ExporterDeprecated
    assert not solve.EnableSessionExporter
    assert not solve.Cache.Imports
    assert [(item.Type, dict(item.Attrs)) for item in solve.Cache.Exports] == [export]
    assert policy in held.solve
    evaluated = gateway.SolveRequest.FromString(held.call)
    assert evaluated.Evaluate
    assert evaluated.Definition == b"\x0a\x01x"
    assert not evaluated.Frontend
    assert not evaluated.FrontendOpt


def test_results_are_known_by_their_names():
    ref = gateway.Ref(id="one", definition=b"\x0a\x01x")
    answer = gateway.SolveResponse(result=gateway.Result(ref=ref)).SerializeToString()
    assert answered_definition(answer) == ("one", b"\x0a\x01x")
    assert answered_definition(b"\xff") == ("", b"")
    returned = gateway.ReturnRequest(result=gateway.Result(ref=gateway.Ref(id="one")))
    assert returned_result(returned.SerializeToString()) == "one"
    assert returned_result(gateway.ReturnRequest().SerializeToString()) == ""
