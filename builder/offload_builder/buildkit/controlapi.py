"""Requests of BuildKit's own clients, read and changed on their way to a daemon.

Fields that we have no name for stay as they are: protobuf keeps unknown fields when a message is
parsed and written again. Source: BuildKit api/services/control/control.proto and
frontend/gateway/pb/gateway.proto; frontend/dockerui/config.go for the parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import DecodeError, Message

from offload_builder.buildkit.solve import Attributed
from offload_core.errors import UsageError
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit import gateway_pb2 as gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

_M = TypeVar("_M", bound=Message)

CACHE_IMPORTS = "cache-imports"
"""The parameter in which the Dockerfile frontend finds caches to read, as JSON."""
OLD_CACHE_IMPORTS = "cache-from"
"""The same for old clients: references, with commas between them."""


@dataclass(frozen=True, slots=True)
class SolveOrder:
    """What a client asks of Control/Solve.

    Attributes:
        ref: the client's name for the build.
        session: identifier of the session that serves it.
        frontend: that runs; empty when the client is the frontend, over LLBBridge.
        attributes: parameters of the frontend. buildx gives them even when it is the frontend.
        policy_session: identifier of the session that is asked about sources; may be empty.
        internal: the client wants no record of it.
        has_definition: it says itself what to build.
        entitlements: rights that are asked for.
        exporters: what becomes of the result.
        cache_imports: caches to read.
        cache_exports: caches to write.
    """

    ref: str
    session: str = ""
    frontend: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    policy_session: str = ""
    internal: bool = False
    has_definition: bool = False
    entitlements: tuple[str, ...] = ()
    exporters: tuple[Attributed, ...] = ()
    cache_imports: tuple[Attributed, ...] = ()
    cache_exports: tuple[Attributed, ...] = ()


def read_order(request: bytes) -> SolveOrder:
    """Return what a serialised control SolveRequest asks for.

    Raises:
        UsageError: it cannot be read.
    """
    message = _parse(control.SolveRequest, request)
    cache = message.Cache
    imports = [Attributed("registry", {"ref": ref}) for ref in cache.ImportRefsDeprecated]
    exports = []
    if cache.ExportRefDeprecated:
        exports.append(Attributed("registry", {"ref": cache.ExportRefDeprecated}))
    return SolveOrder(
        ref=message.Ref,
        session=message.Session,
        policy_session=message.SourcePolicySession,
        frontend=message.Frontend,
        attributes=dict(message.FrontendAttrs),
        internal=message.Internal,
        has_definition=bool(message.Definition),
        entitlements=tuple(message.Entitlements),
        exporters=_attributed(message.Exporters),
        cache_imports=(*imports, *_attributed(cache.Imports)),
        cache_exports=(*exports, *_attributed(cache.Exports)),
    )


def rewrite_order(
    request: bytes,
    *,
    ref: str,
    attributes: Mapping[str, str],
    imports: Sequence[Attributed],
    exports: Sequence[Attributed],
    entitlements: Iterable[str],
    policy_session: str = "",
    proxy_network: bool = False,
) -> bytes:
    """Return a control SolveRequest with another name, other parameters, caches and rights.

    Args:
        request: what the client has sent.
        ref: name of the build at the daemon.
        attributes: parameters of the frontend.
        imports: caches to read.
        exports: caches to write.
        entitlements: rights.
        policy_session: is asked about sources; empty to leave that to the client.
        proxy_network: send the traffic of steps through the daemon's proxy.
    """
    message = _parse(control.SolveRequest, request)
    message.Ref = ref
    message.Cache.Clear()
    message.Cache.Imports.extend(_entry(control.CacheOptionsEntry(), item) for item in imports)
    message.Cache.Exports.extend(_entry(control.CacheOptionsEntry(), item) for item in exports)
    message.Entitlements[:] = list(entitlements)
    message.SourcePolicySession = policy_session or message.SourcePolicySession
    message.ProxyNetwork = message.ProxyNetwork or proxy_network
    _replace(message.FrontendAttrs, attributes)
    if message.Frontend:
        _set_imports(message.FrontendAttrs, imports)
    return message.SerializeToString()


def frontend_attributes(request: bytes) -> dict[str, str]:
    """Return the parameters in a serialised LLBBridge SolveRequest.

    Raises:
        UsageError: it cannot be read.
    """
    return dict(_parse(gateway.SolveRequest, request).FrontendOpt)


def rewrite_frontend_call(
    request: bytes, *, attributes: Mapping[str, str], imports: Sequence[Attributed]
) -> bytes:
    """Return an LLBBridge SolveRequest with other parameters and caches."""
    message = _parse(gateway.SolveRequest, request)
    del message.CacheImports[:]
    _replace(message.FrontendOpt, attributes)
    if message.Frontend:
        _set_imports(message.FrontendOpt, imports)
    else:
        message.CacheImports.extend(_entry(gateway.CacheOptionsEntry(), item) for item in imports)
    return message.SerializeToString()


def named_imports(attributes: Mapping[str, str]) -> list[Attributed]:
    """Return the caches that parameters of the Dockerfile frontend name.

    Raises:
        UsageError: the list cannot be read.
    """
    found = [
        Attributed("registry", {"ref": ref})
        for ref in attributes.get(OLD_CACHE_IMPORTS, "").split(",")
        if ref
    ]
    text = attributes.get(CACHE_IMPORTS, "")
    if not text:
        return found
    try:
        for item in json.loads(text):
            values = {str(key): str(value) for key, value in (item.get("Attrs") or {}).items()}
            found.append(Attributed(str(item["Type"]), values))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError("the caches to read cannot be understood") from error
    return found


def status_ref(request: bytes) -> str:
    """Return the build that a serialised StatusRequest names.

    Raises:
        UsageError: it cannot be read.
    """
    return _parse(control.StatusRequest, request).Ref


def history_change(request: bytes) -> tuple[str, bool]:
    """Return the build that an UpdateBuildHistoryRequest names, and whether its record is changed.

    Without any of the fields the request takes a pin away.

    Raises:
        UsageError: it cannot be read.
    """
    message = _parse(control.UpdateBuildHistoryRequest, request)
    return message.Ref, message.Delete or not message.Finalize


def limited_prune(request: bytes, keep_seconds: float) -> bytes:
    """Return a PruneRequest that spares what was used lately, whatever the client wanted.

    Raises:
        UsageError: it cannot be read.
    """
    message = _parse(control.PruneRequest, request)
    message.keepDuration = max(message.keepDuration, int(keep_seconds * 1e9))
    return message.SerializeToString()


def exporter_response(answer: bytes) -> dict[str, str]:
    """Return what the exporters of a serialised SolveResponse report; empty if it is damaged."""
    try:
        return dict(control.SolveResponse.FromString(answer).ExporterResponse)
    except DecodeError:
        return {}


def answer_of_solve(notes: Mapping[str, str]) -> bytes:
    """Return a serialised SolveResponse."""
    return control.SolveResponse(ExporterResponse=dict(notes)).SerializeToString()


def cleaned_status(
    message: bytes, clean: Callable[[str], str], repaired: Collection[str] = ()
) -> bytes:
    """Return a serialised StatusResponse with every name and error passed through `clean`.

    Args:
        message: as BuildKit has sent it.
        clean: makes a text fit to be seen.
        repaired: digests of steps whose errors are left out.
    """
    response = control.StatusResponse.FromString(message)
    for vertex in response.vertexes:
        error = "" if vertex.digest in repaired else vertex.error
        vertex.name, vertex.error = clean(vertex.name), clean(error)
    for counter in response.statuses:
        counter.ID, counter.name = clean(counter.ID), clean(counter.name)
    return response.SerializeToString()


def _parse(kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise UsageError("the request of the BuildKit client cannot be read") from error


def _attributed(entries: Iterable[Any]) -> tuple[Attributed, ...]:
    return tuple(Attributed(entry.Type, dict(entry.Attrs)) for entry in entries)


def _entry(message: Message, item: Attributed) -> Any:
    filled: Any = message
    filled.Type = item.type
    filled.Attrs.update(item.attributes)
    return filled


def _replace(target: Any, values: Mapping[str, str]) -> None:
    target.clear()
    target.update(values)


def _set_imports(target: Any, imports: Sequence[Attributed]) -> None:
    target.pop(OLD_CACHE_IMPORTS, None)
    target.pop(CACHE_IMPORTS, None)
    if imports:
        target[CACHE_IMPORTS] = json.dumps(
            [{"Type": item.type, "Attrs": dict(item.attributes)} for item in imports]
        )
