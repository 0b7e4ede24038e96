"""Files of a CA that is replaced: every step, crashes in between, and links from former ones."""

from __future__ import annotations

import ssl
import time

import pytest
from cryptography import x509

from offload_builder.gateway import carotation, caset
from offload_builder.gateway.ca import CertificateAuthority
from offload_core.errors import UsageError
from offload_core.trust import fingerprints, successors


def der_of(pem: bytes) -> list[bytes]:
    ends = pem.decode().split("-----END CERTIFICATE-----")
    texts = [f"{text.strip()}\n-----END CERTIFICATE-----\n" for text in ends if text.strip()]
    return [ssl.PEM_cert_to_DER_cert(text) for text in texts]


def switch(directory) -> None:
    with caset.locked(directory):
        found = caset.read(directory)
        assert found.rotation is not None
        done = caset.Rotation(found.rotation.started_at, found.rotation.switch_at, time.time())
        caset.switch(directory, found, done)


def replaced(directory) -> None:
    carotation.begin(directory, 0)
    switch(directory)
    carotation.finish(directory, forget_tokens=False)


def test_both_are_trusted_between_beginning_and_end(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    first = authority.fingerprint()
    carotation.begin(tmp_path, 60)
    assert authority.refresh()
    assert not authority.refresh()
    second = authority.fingerprints()[1]
    assert authority.fingerprints() == (first, second) == fingerprints(authority.ca_pem)
    switch(tmp_path)
    authority.refresh()
    assert authority.fingerprints() == (second, first)
    assert not (tmp_path / "ca-next.key").exists()
    carotation.finish(tmp_path, forget_tokens=False)
    authority.refresh()
    assert authority.fingerprints() == (second,)
    assert first in authority.pinned_fingerprints()


def test_crash_in_the_middle_of_the_switch_is_completed(tmp_path):
    before = CertificateAuthority.open(tmp_path).fingerprint()
    carotation.begin(tmp_path, 0)
    (tmp_path / "ca-old.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
    (tmp_path / "ca-next.key").replace(tmp_path / "ca.key")
    authority = CertificateAuthority.open(tmp_path)
    assert authority.fingerprint() != before
    assert before in authority.fingerprints()


def test_gateway_gets_a_certificate_of_the_new_ca(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    authority.gateway_keys()
    replaced(tmp_path)
    authority.refresh()
    leaf = x509.load_pem_x509_certificate(authority.gateway_keys().certificate_pem)
    leaf.verify_directly_issued_by(authority.trusted[0])


def test_links_lead_from_every_former_ca_to_the_present_one(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    former = []
    for _ in range(3):
        former.append(der_of(authority.ca_pem)[0])
        replaced(tmp_path)
        authority.refresh()
    chain = [b"", *der_of(authority.chain_pem)][1:]
    for root in former:
        assert successors(root, chain)[0] == der_of(authority.ca_pem)[0]


def test_links_of_somebody_else_lead_nowhere(tmp_path):
    mine = CertificateAuthority.open(tmp_path / "mine")
    root = der_of(mine.ca_pem)[0]
    evil = CertificateAuthority.open(tmp_path / "evil")
    replaced(tmp_path / "evil")
    evil.refresh()
    assert successors(root, [root, *der_of(evil.chain_pem)]) == [root]


def test_leaf_of_the_trusted_ca_is_no_link(tmp_path):
    authority = CertificateAuthority.open(tmp_path)
    root, leaf = der_of(authority.ca_pem)[0], authority.gateway_keys().certificate_pem
    assert successors(root, [root, *der_of(leaf)]) == [root]


def test_steps_are_refused_out_of_order(tmp_path):
    CertificateAuthority.open(tmp_path)
    for step in (carotation.abandon, lambda path: carotation.finish(path, forget_tokens=True)):
        with pytest.raises(UsageError):
            step(tmp_path)
    carotation.begin(tmp_path, 60)
    with pytest.raises(UsageError):
        carotation.begin(tmp_path, 60)
    carotation.abandon(tmp_path)
    assert carotation.status(tmp_path).stage == "none"
    assert CertificateAuthority.open(tmp_path).pinned_fingerprints()[1:] == ()
