"""Renewing the server certificate while connections are served."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from pathlib import Path

from grpc import aio

from offload_builder.gateway.ca import CertificateAuthority
from offload_builder.gateway.credentials import RenewingCredentials


async def served_certificate(path: Path, ca_pem: bytes) -> bytes:
    context = ssl.create_default_context(cadata=ca_pem.decode())
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_unix_connection(
        path, ssl=context, server_hostname="gateway.offload"
    )
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    # The server goes on talking HTTP/2: there is no orderly end.
    writer.transport.abort()
    return certificate


async def test_new_connections_get_the_renewed_certificate(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    credentials = RenewingCredentials(authority)
    server = aio.server()
    # Unix socket paths are short: pytest's own directories are not.
    with tempfile.TemporaryDirectory(prefix="o-") as folder:
        path = Path(folder) / "s"
        server.add_secure_port(f"unix:{path}", credentials.server(require_client=False))
        await server.start()
        try:
            first = await served_certificate(path, authority.ca_pem)
            assert not credentials.renew()
            assert await served_certificate(path, authority.ca_pem) == first
            (tmp_path / "gateway.pem").unlink()
            assert credentials.renew()
            assert await served_certificate(path, authority.ca_pem) != first
        finally:
            await server.stop(0)
