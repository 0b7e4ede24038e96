"""The certificate authority."""

from __future__ import annotations

import hashlib
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from offload_builder.gateway.ca import GATEWAY_LIFETIME, CertificateAuthority
from offload_core.errors import ConfigError, UsageError
from offload_core.tls import Identity


def request(key) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


def test_first_start_makes_private_files(tmp_path):
    CertificateAuthority.open(tmp_path / "data")
    for name in ("ca.key", "ticket.key"):
        assert stat.S_IMODE((tmp_path / "data" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_second_start_finds_the_same_ca_and_ticket_key(tmp_path):
    first, second = (CertificateAuthority.open(tmp_path) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.ticket_public_pem() == second.ticket_public_pem()


def test_two_first_starts_at_once_make_one_ca(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: CertificateAuthority.open(tmp_path), range(4)))
    assert len({authority.fingerprint() for authority in found}) == 1


def test_fingerprint_is_that_of_the_der_form(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    der = ssl.PEM_cert_to_DER_cert(authority.ca_pem.decode())
    assert authority.fingerprint() == hashlib.sha256(der).hexdigest()


def test_foreign_ca_key_is_refused(tmp_path):
    CertificateAuthority.open(tmp_path / "a")
    CertificateAuthority.open(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="does not belong"):
        CertificateAuthority.open(tmp_path / "a")


def test_broken_key_file_is_a_configuration_error(tmp_path):
    CertificateAuthority.open(tmp_path)
    (tmp_path / "ca.key").write_text("rubbish")
    with pytest.raises(ConfigError, match="cannot use the gateway's keys"):
        CertificateAuthority.open(tmp_path)


@pytest.mark.parametrize("name", ["gateway.offload", "enroll.offload"])
def test_gateway_certificate_verifies_for_its_names(tmp_path, name):
    authority = CertificateAuthority.open(tmp_path)
    store = verification.Store([x509.load_pem_x509_certificate(authority.ca_pem)])
    verifier = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name))
    leaf = x509.load_pem_x509_certificate(authority.gateway_keys().certificate_pem)
    verifier.verify(leaf, [])


def test_gateway_certificate_is_kept_until_half_of_its_life_is_over(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    now = datetime.now(UTC)
    first = authority.gateway_keys(now)
    early = authority.gateway_keys(now + GATEWAY_LIFETIME * 0.4)
    assert early.certificate_pem == first.certificate_pem
    late = authority.gateway_keys(now + GATEWAY_LIFETIME * 0.6)
    assert late.certificate_pem != first.certificate_pem


def test_member_certificate_carries_the_identity_for_clients_only(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    identity = Identity("member", "ann@example.org", "abc", "member")
    keys, expires_at = authority.issue_member(identity, soon())
    leaf = x509.load_pem_x509_certificate(keys.certificate_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert Identity.parse(uris[0]) == identity
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert leaf.not_valid_after_utc == expires_at
    assert leaf.not_valid_before_utc < datetime.now(UTC)


def test_node_certificate_has_its_server_name_and_the_key_of_the_request(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.issue_node(request(key), node_id="node-1", token_id="abc", expires_at=soon())
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    expected = ["node-1.node.offload", "*.buildkit.offload"]
    assert names.get_values_for_type(x509.DNSName) == expected
    assert leaf.public_key() == key.public_key()


@pytest.mark.parametrize("node_id", ["", "Node", "a.b", "-a", "a" * 41, "a_b", "gateway.offload"])
def test_node_name_that_is_no_dns_label_is_refused(tmp_path, node_id):
    authority = CertificateAuthority.open(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(UsageError, match="cannot be the name of a node"):
        authority.issue_node(request(key), node_id=node_id, token_id="t", expires_at=soon())


@pytest.mark.parametrize("csr", [b"", b"rubbish", request(rsa.generate_private_key(65537, 1024))])
def test_bad_certificate_request_is_refused(tmp_path, csr):
    authority = CertificateAuthority.open(tmp_path)
    with pytest.raises(UsageError):
        authority.issue_node(csr, node_id="node-1", token_id="t", expires_at=soon())
