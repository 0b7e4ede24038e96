"""Writes the calls that matter into the audit log, whatever becomes of them."""

from __future__ import annotations

import ssl
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from offload_builder.gateway.audit import OK, AuditLog, Event
from offload_builder.gateway.peers import peer_host
from offload_builder.gateway.ratelimits import Limiter, address_keys
from offload_builder.gateway.tokens import TokenText, role_name
from offload_core.errors import (
    AuthenticationError,
    OffloadError,
    QuotaExceededError,
    find_offload_error,
)
from offload_core.tls import Identity, peer_identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from offload_proto.v1 import builds_service_pb2 as builds_pb
    from offload_proto.v1 import cache_service_pb2 as cache_pb
    from offload_proto.v1 import egress_service_pb2 as egress_pb
    from offload_proto.v1 import identity_service_pb2 as identity_pb
    from offload_proto.v1 import nodes_service_pb2 as nodes_pb
    from offload_proto.v1 import sessions_service_pb2 as sessions_pb

Fields = dict[str, Any]
"""What is known about a call beyond who made it; names of `Event`."""


def _login(request: identity_pb.LoginRequest, response: identity_pb.LoginResponse | None) -> Fields:
    found: Fields = {"token_id": _token_id(request.token)}
    if response is not None:
        found |= {"member": response.member, "role": role_name(response.role)}
    return found


def _exchange(_: object, response: identity_pb.ExchangeResponse | None) -> Fields:
    if response is None:
        return {}
    told = response.identity
    return {
        "member": response.member,
        "role": role_name(response.role),
        "detail": f"rule {told.rule}: {told.subject} at {told.issuer} {told.run_url}".strip(),
        "certificate": response.certificate.certificate_pem,
    }


def _enroll(request: identity_pb.EnrollNodeRequest, response: object) -> Fields:
    found: Fields = {"token_id": _token_id(request.token), "detail": f"node {request.node_id}"}
    if response is not None:
        found |= {"member": request.node_id, "role": "node"}
    return found


def _create_token(
    request: identity_pb.CreateTokenRequest, response: identity_pb.CreateTokenResponse | None
) -> Fields:
    made = f"{response.token.token_id} " if response is not None else ""
    projects = ", ".join(request.project_ids) or "all projects"
    return {"detail": f"{made}{request.name} {role_name(request.role)} for {projects}"}


def _create(request: builds_pb.CreateRequest, response: builds_pb.CreateResponse | None) -> Fields:
    found: Fields = {"project_id": request.project_id, "detail": request.name}
    if response is not None:
        state = response.assigned if response.HasField("assigned") else response.queued
        found["build_id"] = state.build_id
    return found


def _admit(request: nodes_pb.AdmitRequest, response: nodes_pb.AdmitResponse | None) -> Fields:
    """Return who builds through a node; of a refused one only the node is proved."""
    found: Fields = {"project_id": request.build.project_id, "detail": request.build.name}
    if response is not None:
        state = response.assigned if response.HasField("assigned") else response.queued
        certificate = ssl.DER_cert_to_PEM_cert(request.certificate_der).encode()
        found |= {"build_id": state.build_id, "certificate": certificate}
    return found


def _prune(request: cache_pb.PruneRequest, response: cache_pb.PruneResponse | None) -> Fields:
    if request.dry_run:
        return {"action": ""}
    freed = f"; {response.result.freed_bytes} bytes" if response is not None else ""
    scope = request.filter.scope or "all scopes"
    return {"project_id": request.project_id, "detail": f"{scope}{freed}"}


def _promote(request: cache_pb.PromoteRequest, _: object) -> Fields:
    to = request.to_scope or "the default branch"
    return {"project_id": request.project_id, "detail": f"{request.from_scope} to {to}"}


def _policy(
    request: egress_pb.ApplyPolicyRequest, response: egress_pb.ApplyPolicyResponse | None
) -> Fields:
    if request.dry_run:
        return {"action": ""}
    version = f"version {response.version}" if response is not None else ""
    detail = " ".join(filter(None, (version, request.file, request.note)))
    return {"project_id": request.project_id, "detail": detail}


def _policy_again(request: egress_pb.RollbackPolicyRequest, _: object) -> Fields:
    return {"project_id": request.project_id, "detail": f"version {request.version} again"}


def _start_session(
    request: sessions_pb.StartSessionRequest, response: sessions_pb.StartSessionResponse | None
) -> Fields:
    detail = request.spec.name
    if response is not None:
        kind = response.WhichOneof("state")
        told = response.ready.session if kind == "ready" else getattr(response, kind or "queued")
        detail = f"{told.session_id} {detail}"
    return {"project_id": request.project_id, "detail": detail}


def _stop_session(
    request: sessions_pb.StopSessionRequest, response: sessions_pb.StopSessionResponse | None
) -> Fields:
    if response is None:
        return {"detail": request.session_id[:16]}
    session = response.session
    return {
        "project_id": session.project_id,
        "detail": f"{session.session_id} {session.spec.name} of {session.owner}",
    }


def _share_session(
    request: sessions_pb.ShareSessionRequest, response: sessions_pb.Session | None
) -> Fields:
    names = [f"+{name}" for name in request.add] + [f"-{name}" for name in request.remove]
    found = {"detail": " ".join((request.session_id[:16], *names))}
    return found if response is None else found | {"project_id": response.project_id}


ACTIONS: dict[str, tuple[str, Callable[[Any, Any], Fields]]] = {
    "EnrollmentService/Login": ("login", _login),
    "EnrollmentService/Exchange": ("login.external", _exchange),
    "EnrollmentService/EnrollNode": ("node.enrolled", _enroll),
    "IdentityService/Renew": ("login.renewed", lambda *_: {}),
    "IdentityService/RenewNode": ("node.renewed", lambda *_: {}),
    "AdminService/CreateToken": ("token.created", _create_token),
    "AdminService/RevokeToken": (
        "token.revoked",
        lambda request, _: {"detail": request.token_id[:40]},
    ),
    "AdminService/CreateProject": (
        "project.created",
        lambda request, _: {"project_id": request.project_id},
    ),
    "NodesService/Attach": ("node.attached", lambda *_: {}),
    "NodesService/Admit": ("build.created", _admit),
    "BuildsService/Create": ("build.created", _create),
    "BuildsService/Cancel": (
        "build.cancelled",
        lambda request, _: {"build_id": request.build_id},
    ),
    "SessionsService/StartSession": ("session.started", _start_session),
    "SessionsService/StopSession": ("session.stopped", _stop_session),
    "SessionsService/ShareSession": ("session.shared", _share_session),
    "CacheService/Prune": ("cache.pruned", _prune),
    "CacheService/Promote": ("cache.promoted", _promote),
    "EgressService/ApplyPolicy": ("policy.applied", _policy),
    "EgressService/RollbackPolicy": ("policy.applied", _policy_again),
}
"""By service and method: what is written, and what of request and response."""


class AuditInterceptor(aio.ServerInterceptor):
    """Belongs inside of the interceptor that answers with errors."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        # An address that is sent away again and again must not fill the log.
        self._limited = Limiter(1)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call that is written down."""
        handler = await continuation(handler_call_details)
        known = ACTIONS.get(handler_call_details.method.rpartition("offload.v1.")[2])
        if handler is None or known is None:
            return handler
        serialisers = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, *known), *serialisers
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, *known), *serialisers
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream, *known), *serialisers
        )

    def _unary(self, handler: Any, action: str, describe: Callable[[Any, Any], Fields]) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                response = await handler(request, context)
            except Exception as error:
                self._note(action, context, describe(request, None), error)
                raise
            self._note(action, context, describe(request, response), None)
            return response

        return call

    def _stream(self, handler: Any, action: str, describe: Callable[[Any, Any], Fields]) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            noted = False
            try:
                async with aclosing(handler(request, context)) as responses:
                    async for response in responses:
                        if noted:
                            yield response
                            continue
                        noted = True
                        try:
                            # The caller need not wait until this is written.
                            yield response
                        finally:
                            self._note(action, context, describe(request, response), None)
            except Exception as error:
                if not noted:
                    self._note(action, context, describe(request, None), error)
                raise

        return call

    def _note(
        self,
        action: str,
        context: aio.ServicerContext[Any, Any],
        fields: Fields,
        error: Exception | None,
    ) -> None:
        host = peer_host(context)
        known = find_offload_error(error) if error is not None else None
        if isinstance(known, QuotaExceededError) and known.retry_after_seconds:
            key = address_keys(host)[0][0]
            if self._limited.wait(key):
                return
            self._limited.count(key)
        caller = _caller(context, fields.pop("certificate", b""))
        found = {"action": action, **caller, "address": host, **fields}
        if not found["action"]:
            return
        if error is not None:
            found["result"] = known.reason if known is not None else "INTERNAL"
            found["detail"] = f"{found.get('detail', '')}: {_reason(known)}".removeprefix(": ")
        self._audit.note(Event(**{"result": OK} | found))


def _reason(error: OffloadError | None) -> str:
    return error.message if error is not None else "the gateway failed"


def _token_id(text: str) -> str:
    try:
        return TokenText.parse(text).token_id
    except AuthenticationError:
        return ""


def _caller(context: aio.ServicerContext[Any, Any], certificate_pem: bytes) -> Fields:
    identity: Identity | None = None
    if certificate_pem:
        identity = _identity_in(certificate_pem)
    else:
        try:
            identity = peer_identity(context)
        except AuthenticationError:
            return {}
    if identity is None:
        return {}
    return {"member": identity.name, "role": identity.role, "token_id": identity.token_id}


def _identity_in(certificate_pem: bytes) -> Identity | None:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    for uri in names.value.get_values_for_type(x509.UniformResourceIdentifier):
        if (identity := Identity.parse(uri)) is not None:
            return identity
    return None
