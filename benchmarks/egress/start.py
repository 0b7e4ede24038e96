"""Cases `start-isolated*`: from nothing to a BuildKit that answers, as a node does it."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

from benchmarks.daemons import TOOLS
from benchmarks.egress import rules
from benchmarks.model import Case
from offload_builder.buildkit import BuildkitDaemon, DaemonSettings
from offload_builder.egress.held import HeldPolicies
from offload_builder.node.config import NodeConfig
from offload_builder.node.isolation import Isolation
from offload_builder.node.trustdomain import TrustDomain
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_proto.v1.nodes_service_pb2 import AttachResponse

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session

RUNS = 12
LIMIT_SECONDS = 0.5
_BARE = "the same BuildKit on the machine's own network"
START = Case("start-isolated", "a project's namespace, names and BuildKit, no policy", _BARE)
ADDED = Case("start-isolated-added", "the difference in each round", "", limit=LIMIT_SECONDS)
START_MANY = Case("start-isolated-10k-rules", "the same, a policy of 10,000 rules", _BARE)
ADDED_MANY = Case(
    "start-isolated-10k-rules-added", "the difference in each round", "", limit=LIMIT_SECONDS
)
CASES = (START, ADDED, START_MANY, ADDED_MANY)


def start(session: Session, ground: Ground) -> None:
    """Measure the cases."""
    none = _isolation(ground, ground.work / "none", "netns")
    many = _isolation(ground, ground.work / "many", "netns", rules.many())
    bare = _isolation(ground, ground.work / "bare", "none")
    found = session.interleave(
        START.name,
        {
            "none": lambda number: ground.run(_started(*none, number)),
            "many": lambda number: ground.run(_started(*many, number)),
            "bare": lambda number: ground.run(_started(*bare, number)),
        },
        runs=RUNS,
    )
    for case, added, name in ((START, ADDED, "none"), (START_MANY, ADDED_MANY, "many")):
        session.report(case.name, found[name], found["bare"])
        pairs = zip(found[name], found["bare"], strict=True)
        session.report(added.name, [ours - theirs for ours, theirs in pairs])


def _isolation(
    ground: Ground, folder: Path, kind: str, policy: str = ""
) -> tuple[Isolation, NodeConfig]:
    """Open what a node has around its BuildKits."""
    (folder / "data").mkdir(parents=True)
    config = NodeConfig(gateway="127.0.0.1:1", data=folder / "data", isolation=kind)
    registry = ground.enter(RegistryServer(Registry()))
    policies = ground.enter(HeldPolicies(folder / "egress.json"))
    made = ground.enter(Isolation(config, registry, policies))
    if policy:
        message = AttachResponse()
        message.egress_policies.policies.add(version=1, file="policy.toml", text=policy)
        policies.take_message(message)
        ground.run(policies.settled())
    return made, config


async def _started(isolation: Isolation, config: NodeConfig, number: int) -> float:
    """Start the BuildKit of a project that was never here; return the seconds until it answers."""
    domain = TrustDomain(f"project-{number}")
    root = domain.folder(config) / "buildkit"
    began = time.perf_counter()
    async with isolation.place(domain) as place:
        settings = place.settings(DaemonSettings(root=root, search=[TOOLS]))
        async with BuildkitDaemon(settings) as daemon:
            await daemon.ensure_running()
            await place.ready()
            seconds = time.perf_counter() - began
    shutil.rmtree(root, ignore_errors=True)
    return seconds
