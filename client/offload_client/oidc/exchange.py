"""At the gateway: how to log in there, and a certificate for a provider's token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offload_client.identity import LOGIN_SECONDS, StoredIdentity, from_certificate
from offload_core.errors import GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.tls import ENROLL_NAME, open_channel
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from offload_client.identity import Origin
    from offload_proto.v1.identity_service_pb2 import DescribeLoginResponse, ExchangeResponse


async def describe_login(gateway: str, ca_pem: bytes) -> DescribeLoginResponse:
    """Return how one can log in at a gateway.

    Raises:
        GatewayUnreachableError: it does not answer.
    """
    from offload_proto.v1.identity_service_pb2 import DescribeLoginRequest

    reply: DescribeLoginResponse = await _call(
        gateway, ca_pem, "DescribeLogin", DescribeLoginRequest()
    )
    return reply


async def exchange(
    gateway: str, ca_pem: bytes, token: str, origin: Origin
) -> tuple[StoredIdentity, ExchangeResponse]:
    """Exchange a provider's token for a certificate.

    Raises:
        AuthenticationError: the gateway refuses the token.
        AccessDeniedError: no rule of the gateway matches it.
        GatewayUnreachableError: the gateway, or the issuer, does not answer.
    """
    from offload_proto.v1.identity_service_pb2 import ExchangeRequest

    reply: ExchangeResponse = await _call(
        gateway, ca_pem, "Exchange", ExchangeRequest(token=token.strip())
    )
    plain = from_certificate(reply.certificate)
    return StoredIdentity(plain.keys, plain.expires_at, origin), reply


async def _call(gateway: str, ca_pem: bytes, method: str, request: Any) -> Any:
    import grpc

    from offload_proto.v1.identity_service_pb2_grpc import EnrollmentServiceStub

    async with open_channel(gateway, ENROLL_NAME, ca_pem=ca_pem) as channel:
        try:
            return await getattr(EnrollmentServiceStub(channel), method)(
                request, timeout=LOGIN_SECONDS, metadata=call_metadata()
            )
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer=f"the gateway at {gateway}",
                unreachable=GatewayUnreachableError,
            ) from error
