"""A second way into the BuildKit of our node, for the peers: a TCP port with mutual TLS.

Our client reaches the node over TCP with TLS. The stock clients get the same: the node is given a
script as its `buildkitd`, which starts the real one with its unix socket and this port.
"""

from __future__ import annotations

import datetime
import ipaddress
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from benchmarks.daemons import TOOLS

if TYPE_CHECKING:
    from pathlib import Path

LIFETIME = datetime.timedelta(days=1)
# The node writes the unix socket into the file that it names with --config; flags win over it.
SCRIPT = """\
#!/bin/sh
for argument; do
  case $argument in --config=*) config=${{argument#--config=}} ;; esac
done
socket=$(sed -n 's/^address = \\["\\(unix:[^"]*\\)"\\]$/\\1/p' "$config")
exec {buildkitd} "$@" --addr "$socket" --addr {address} \\
  --tlscacert {ca} --tlscert {certificate} --tlskey {key}
"""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end of a connection."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def driver_options(self) -> str:
        """For `docker buildx create --driver remote`."""
        return f"cacert={self.ca},cert={self.certificate},key={self.key}"

    @property
    def flags(self) -> tuple[str, ...]:
        """For buildctl and buildkitd."""
        return (
            f"--tlscacert={self.ca}",
            f"--tlscert={self.certificate}",
            f"--tlskey={self.key}",
        )


@dataclass(frozen=True)
class BuildkitPort:
    """Where the peers find BuildKit.

    Attributes:
        address: tcp://HOST:PORT.
        client: what a client shows and trusts.
        script: to be the node's `buildkitd`.
    """

    address: str
    client: TlsFiles
    script: Path


def open_port(
    folder: Path, host: str, port: int, *, buildkitd: Path = TOOLS / "buildkitd"
) -> BuildkitPort:
    """Make keys, certificates and the script for a port that BuildKit is to open at an IP."""
    folder.mkdir(parents=True)
    authority = _Authority(folder)
    server = authority.issue("server", ipaddress.ip_address(host))
    address = f"tcp://{host}:{port}"
    script = folder / "buildkitd"
    script.write_text(
        SCRIPT.format(
            buildkitd=shlex.quote(str(buildkitd)),
            address=address,
            ca=shlex.quote(str(server.ca)),
            certificate=shlex.quote(str(server.certificate)),
            key=shlex.quote(str(server.key)),
        )
    )
    script.chmod(0o700)
    return BuildkitPort(address, authority.issue("client"), script)


class _Authority:
    """A CA whose key is in memory only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
        constraint = x509.BasicConstraints(ca=True, path_length=0)
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(constraint, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._file = folder / "ca.pem"
        self._file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    ) -> TlsFiles:
        """Return a certificate for a server at an address, or for a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = ExtendedKeyUsageOID.SERVER_AUTH if address else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._builder(subject, key.public_key()).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if address is not None:
            names = x509.SubjectAlternativeName([x509.IPAddress(address)])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        files = TlsFiles(self._file, self._folder / f"{name}.pem", self._folder / f"{name}-key.pem")
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - LIFETIME)
            .not_valid_after(now + LIFETIME)
        )
