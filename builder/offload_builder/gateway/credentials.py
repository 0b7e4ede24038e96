"""Server credentials whose certificate is renewed while the gateway runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from offload_builder.gateway.ca import CertificateAuthority
    from offload_core.tls import KeyPair


class RenewingCredentials:
    """The gateway's certificate for its two inner servers; `renew` from time to time."""

    def __init__(self, authority: CertificateAuthority) -> None:
        """Load or issue the certificate.

        Raises:
            ConfigError: the data directory cannot be written.
        """
        self._authority = authority
        self._keys = authority.gateway_keys()

    def renew(self) -> bool:
        """Issue a new certificate when half of the old one's life is over; tell if so.

        Raises:
            ConfigError: the data directory cannot be written.
        """
        keys = self._authority.gateway_keys()
        changed = keys.certificate_pem != self._keys.certificate_pem
        self._keys = keys
        return changed

    def server(self, *, require_client: bool) -> grpc.ServerCredentials:
        """Return credentials that use the newest certificate in each handshake."""
        used = self._keys

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            if self._keys is used:
                return None
            used = self._keys
            return _configuration(used, require_client=require_client)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(used, require_client=require_client),
            newest,  # type: ignore[arg-type]  # None for "no change" is documented by grpc
            require_client_authentication=require_client,
        )


def _configuration(keys: KeyPair, *, require_client: bool) -> grpc.ServerCertificateConfiguration:
    # The CA is sent as well: a client at its first login knows only its fingerprint.
    return grpc.ssl_server_certificate_configuration(
        [(keys.private_key_pem, keys.certificate_pem + keys.ca_pem)],
        root_certificates=keys.ca_pem if require_client else None,
    )
