"""The gateway's own certificate, renewed while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core.servercredentials import ReloadingCredentials

if TYPE_CHECKING:
    from offload_builder.gateway.ca import CertificateAuthority


class RenewingCredentials(ReloadingCredentials):
    """The gateway's certificate for its two inner servers; `renew` from time to time."""

    def __init__(self, authority: CertificateAuthority) -> None:
        """Load or issue the certificate.

        Raises:
            ConfigError: the data directory cannot be written.
        """
        self._authority = authority
        super().__init__(authority.gateway_keys(), authority.chain_pem)

    def renew(self) -> bool:
        """Issue a new certificate when half of the old one's life is over; tell if so.

        Also takes over another CA.

        Raises:
            ConfigError: the data directory cannot be written.
        """
        return self.use(self._authority.gateway_keys(), self._authority.chain_pem)
