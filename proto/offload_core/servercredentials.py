"""gRPC server credentials that can be replaced while the server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from offload_core.tls import KeyPair


class ReloadingCredentials:
    """The certificate of a server, its CAs included; `use` replaces it for new connections."""

    def __init__(self, keys: KeyPair, chain_pem: bytes = b"") -> None:
        """Begin with some keys; see `use`."""
        self.keys = keys
        self._chain_pem = chain_pem or keys.ca_pem
        self._version = 0
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change; for listeners that are not gRPC's."""
        self._listeners.append(listener)

    def use(self, keys: KeyPair, chain_pem: bytes = b"") -> bool:
        """Use other keys in each handshake from now on; tell if they are others.

        Args:
            keys: certificate and key of the server, and the CAs whose clients get in.
            chain_pem: certificates that are shown behind the server's own; the CAs by default.
        """
        chain_pem = chain_pem or keys.ca_pem
        if keys == self.keys and chain_pem == self._chain_pem:
            return False
        self.keys, self._chain_pem = keys, chain_pem
        self._version += 1
        for listener in self._listeners:
            listener()
        return True

    def server(self, *, require_client: bool) -> grpc.ServerCredentials:
        """Return credentials for a listener; with `require_client` only our CAs' clients get in."""
        import grpc

        used = self._version

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            if self._version == used:
                return None
            used = self._version
            return self._configuration(require_client=require_client)

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(require_client=require_client),
            newest,  # type: ignore[arg-type]  # None for "no change" is documented by grpc
            require_client_authentication=require_client,
        )

    def _configuration(self, *, require_client: bool) -> grpc.ServerCertificateConfiguration:
        import grpc

        # The CA is sent as well: a client at its first login knows only its fingerprint.
        return grpc.ssl_server_certificate_configuration(
            [(self.keys.private_key_pem, self.keys.certificate_pem + self._chain_pem)],
            root_certificates=self.keys.ca_pem if require_client else None,
        )
