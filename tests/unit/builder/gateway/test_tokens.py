"""Rules of tokens and tickets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offload_builder.gateway.tickets import SIGNED_PREFIX, sign
from offload_builder.gateway.tokens import TokenText, new_record, verify
from offload_core.errors import AccessDeniedError, AuthenticationError, UsageError
from offload_core.logs import redact
from offload_core.trust import token_fingerprint
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb

CA = "ab" * 32
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def made(**values):
    text = TokenText.generate(CA)
    defaults = {
        "name": "ann",
        "role": identity_pb.ROLE_MEMBER,
        "project_ids": (),
        "expires_at": None,
        "now": NOW,
    }
    return text, new_record(text, **defaults | values)


def test_token_text_survives_parsing():
    text = TokenText.generate(CA)
    assert TokenText.parse(text.reveal() + "\n") == text


def test_token_text_carries_the_fingerprint_that_clients_read():
    assert token_fingerprint(TokenText.generate(CA).reveal()) == CA[:32]


def test_token_is_recognised_by_the_log_redaction():
    event = redact(None, "info", {"text": f"got {TokenText.generate(CA).reveal()}"})
    assert event["text"] == "got ***"


def test_repr_of_a_token_hides_the_secret():
    text, record = made()
    assert text.secret not in repr(text)
    assert text.secret not in str(text)
    assert record.secret_hash not in repr(record)
    assert text.secret not in record.secret_hash


@pytest.mark.parametrize("text", ["", "ofl_x", "hello", "ofl_" + "a" * 12 + "_b_c", "é" * 100])
def test_text_that_is_no_token_is_refused_without_repeating_it(text):
    with pytest.raises(AuthenticationError) as caught:
        TokenText.parse(text)
    assert not text or text not in caught.value.message


def test_right_token_is_verified():
    text, record = made()
    assert verify(text, record, ca_fingerprints=(CA,), now=NOW) is record


def test_wrong_secret_is_refused():
    text, record = made()
    other = TokenText(text.token_id, TokenText.generate(CA).secret, text.fingerprint)
    with pytest.raises(AuthenticationError, match="does not know"):
        verify(other, record, ca_fingerprints=(CA,), now=NOW)


def test_unknown_token_gets_the_same_sentence_as_a_wrong_secret():
    with pytest.raises(AuthenticationError, match="does not know"):
        verify(TokenText.generate(CA), None, ca_fingerprints=(CA,), now=NOW)


def test_token_of_another_gateway_is_named_as_such():
    text, record = made()
    with pytest.raises(AuthenticationError, match="another gateway"):
        verify(text, record, ca_fingerprints=("cd" * 32,), now=NOW)


def test_expired_token_is_refused_with_its_end():
    text, record = made(expires_at=NOW + timedelta(hours=1))
    verify(text, record, ca_fingerprints=(CA,), now=NOW)
    with pytest.raises(AuthenticationError, match="expired on 2030-01-01 01:00 UTC"):
        verify(text, record, ca_fingerprints=(CA,), now=NOW + timedelta(hours=1))


def test_token_that_ends_in_the_past_cannot_be_made():
    with pytest.raises(UsageError):
        made(expires_at=NOW)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "-a", "a/b"])
def test_name_that_breaks_certificates_is_refused(name):
    with pytest.raises(UsageError):
        made(name=name)


def test_token_opens_only_its_projects():
    _, record = made(project_ids=("shop", "site"))
    record.check_project("shop")
    with pytest.raises(AccessDeniedError, match="only shop, site"):
        record.check_project("bank")


def test_administrator_opens_every_project():
    _, record = made(role=identity_pb.ROLE_ADMIN, project_ids=("shop",))
    record.check_project("bank")


def test_ticket_is_signed_over_the_bytes_that_are_sent():
    key = Ed25519PrivateKey.generate()
    signed = sign(key, builds_pb.Ticket(build_id="b", node_id="n"))
    key.public_key().verify(signed.signature, SIGNED_PREFIX + signed.payload)
    assert builds_pb.Ticket.FromString(signed.payload).build_id == "b"
