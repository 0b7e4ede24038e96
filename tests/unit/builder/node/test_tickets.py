"""Which tickets a node takes."""

from __future__ import annotations

import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from offload_builder.gateway.savedimages import sign_image
from offload_builder.gateway.tickets import sign
from offload_builder.node.tickets import TicketVerifier
from offload_core.errors import AccessDeniedError, InternalError
from offload_proto.v1.builds_service_pb2 import ImageTicket, SignedTicket, Ticket

KEY = Ed25519PrivateKey.generate()


def pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def verifier() -> TicketVerifier:
    found = TicketVerifier("node-1")
    found.trust(pem(KEY))
    return found


def ticket(**values) -> Ticket:
    made = Ticket(build_id="b", project_id="p", node_id="node-1", member="alice")
    made.expires_at.FromSeconds(int(time.time()) + 60)
    made.MergeFrom(Ticket(**values))
    return made


def test_good_ticket_is_taken_once(verifier):
    signed = sign(KEY, ticket())
    assert verifier.redeem(signed, member="alice").project_id == "p"
    with pytest.raises(AccessDeniedError, match="used before"):
        verifier.redeem(signed, member="alice")
    # Nor does a fresh signature over the same build help.
    with pytest.raises(AccessDeniedError, match="used before"):
        verifier.redeem(sign(KEY, ticket(project_id="q")), member="alice")


def test_forged_tickets_are_refused(verifier):
    payload = ticket().SerializeToString()
    good = sign(KEY, ticket())
    for forged in (
        sign(Ed25519PrivateKey.generate(), ticket()),
        SignedTicket(payload=payload, signature=KEY.sign(payload)),
        SignedTicket(payload=payload + b"\x00", signature=good.signature),
        SignedTicket(payload=payload, signature=b""),
        SignedTicket(payload=payload, signature=good.signature[:-1]),
        SignedTicket(),
    ):
        with pytest.raises(AccessDeniedError, match="not signed by this gateway"):
            verifier.redeem(forged, member="alice")


@pytest.mark.parametrize(
    ("values", "member", "sentence"),
    [
        ({"node_id": "node-2"}, "alice", "for node node-2"),
        ({}, "mallory", "another member"),
        ({"member": "mallory"}, "alice", "another member"),
    ],
)
def test_tickets_of_others_are_refused_and_stay_usable(verifier, values, member, sentence):
    signed = sign(KEY, ticket(**values))
    with pytest.raises(AccessDeniedError, match=sentence):
        verifier.redeem(signed, member=member)
    assert verifier.redeem(sign(KEY, ticket()), member="alice")


def test_expired_ticket_is_refused(verifier):
    late = ticket()
    late.expires_at.FromSeconds(int(time.time()) - 1)
    with pytest.raises(AccessDeniedError, match="expired"):
        verifier.redeem(sign(KEY, late), member="alice")


def test_used_tickets_are_forgotten_after_they_expired(verifier):
    soon = ticket()
    soon.expires_at.FromSeconds(int(time.time()) + 1)
    verifier.redeem(sign(KEY, soon), member="alice")
    time.sleep(1.1)
    verifier.redeem(sign(KEY, ticket(build_id="c")), member="alice")
    assert list(verifier._used) == ["c"]


def test_node_without_a_key_takes_nothing_and_takes_only_ed25519():
    fresh = TicketVerifier("node-1")
    with pytest.raises(AccessDeniedError, match="not yet heard"):
        fresh.redeem(sign(KEY, ticket()), member="alice")
    with pytest.raises(InternalError):
        fresh.trust(pem(X25519PrivateKey.generate()))


def image_ticket(**values) -> ImageTicket:
    made = ImageTicket(build_id="b", project_id="p", node_id="node-1", member="alice", digest="d")
    made.expires_at.FromSeconds(int(time.time()) + 60)
    made.MergeFrom(ImageTicket(**values))
    return made


def test_image_ticket_may_be_used_again(verifier):
    signed = sign_image(KEY, image_ticket())
    for _ in range(2):
        assert verifier.image(signed, member="alice").digest == "d"


def test_image_ticket_of_another_kind_member_node_or_time_is_refused(verifier):
    late = image_ticket()
    late.expires_at.FromSeconds(int(time.time()) - 1)
    with pytest.raises(AccessDeniedError, match="expired"):
        verifier.image(sign_image(KEY, late), member="alice")
    with pytest.raises(AccessDeniedError, match="another member"):
        verifier.image(sign_image(KEY, image_ticket()), member="bob")
    with pytest.raises(AccessDeniedError, match="is for node node-2"):
        verifier.image(sign_image(KEY, image_ticket(node_id="node-2")), member="alice")
    with pytest.raises(AccessDeniedError, match="not signed by this gateway"):
        verifier.image(sign(KEY, ticket()), member="alice")
    with pytest.raises(AccessDeniedError, match="not signed by this gateway"):
        verifier.redeem(sign_image(KEY, image_ticket()), member="alice")
