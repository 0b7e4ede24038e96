"""A build as BuildKit's control API takes it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from offload_proto.buildkit.control_pb2 import (
    CacheOptions,
    CacheOptionsEntry,
    Exporter,
    SolveRequest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOCKERFILE_FRONTEND = "dockerfile.v0"


class Attributed(NamedTuple):
    """An exporter or a cache: a kind with parameters, both by BuildKit's names."""

    type: str
    attributes: Mapping[str, str]


def new_ref() -> str:
    """Return a fresh name for a build."""
    return secrets.token_hex(13)


@dataclass(frozen=True, slots=True)
class SolveSpec:
    """One build.

    Attributes:
        frontend: "dockerfile.v0", or "gateway.v0" with a `source` attribute.
        frontend_attributes: the frontend's parameters, such as "filename" or "build-arg:X".
        exporters: what becomes of the result; their positions number the session's outputs.
        cache_imports: caches to read.
        cache_exports: caches to write.
        entitlements: rights that the build may use, such as "network.host".
        internal: leave no record in the daemon's history.
        proxy_network: send the traffic of steps through the daemon's proxy.
        trace: name of the build's control group, see `stepgroups`; empty for none.
        ref: name of the build, needed to follow its progress.
    """

    frontend_attributes: Mapping[str, str]
    frontend: str = DOCKERFILE_FRONTEND
    exporters: Sequence[Attributed] = ()
    cache_imports: Sequence[Attributed] = ()
    cache_exports: Sequence[Attributed] = ()
    entitlements: Sequence[str] = ()
    internal: bool = False
    proxy_network: bool = False
    trace: str = ""
    ref: str = field(default_factory=new_ref)


@dataclass(frozen=True, slots=True)
class SolveResult:
    """A build that worked.

    Attributes:
        exporter_response: notes of the exporters, for example "containerimage.digest".
    """

    exporter_response: dict[str, str]


def solve_request(spec: SolveSpec, session_id: str, policy_session: str = "") -> bytes:
    """Return the serialised request.

    Cache imports are sent twice: the Dockerfile frontend reads them from its own parameters, as a
    JSON list, and everything else from the request.
    """
    attributes = dict(spec.frontend_attributes)
    if spec.cache_imports:
        attributes["cache-imports"] = json.dumps(
            [{"Type": kind, "Attrs": dict(values)} for kind, values in spec.cache_imports]
        )
    request = SolveRequest(
        Ref=spec.ref,
        Session=session_id,
        Frontend=spec.frontend,
        FrontendAttrs=attributes,
        Cache=CacheOptions(
            Exports=[_cache_entry(entry) for entry in spec.cache_exports],
            Imports=[_cache_entry(entry) for entry in spec.cache_imports],
        ),
        Entitlements=list(spec.entitlements),
        Internal=spec.internal,
        Exporters=[Exporter(Type=kind, Attrs=dict(values)) for kind, values in spec.exporters],
        SourcePolicySession=policy_session,
        ProxyNetwork=spec.proxy_network,
    )
    return request.SerializeToString()


def _cache_entry(entry: Attributed) -> CacheOptionsEntry:
    kind, values = entry
    return CacheOptionsEntry(Type=kind, Attrs=dict(values))
