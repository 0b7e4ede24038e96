"""What leaves a machine in a bundle has no secrets."""

from __future__ import annotations

import pytest

from offload_client.sessions.scrubbing import scrub

TOKEN = "ofl_ab12cd_" + "S" * 40 + "_0123456789abcdef0123456789abcdef"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0\n-----END PRIVATE KEY-----"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm5hIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"login with {TOKEN} failed", "SSSS"),
        (f"key: {PEM} end", "MIIEvQ"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE", "MHcCAQEE"),
        (f"id token {JWT}", "c2lnbmF0dXJl"),
        ("GET / Authorization: Bearer abc.def-ghi", "abc.def"),
        ("authorization=Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ('{"auths": {"r": {"auth": "dXNlcjpwYXNz"}}}', "dXNlcjpwYXNz"),
        ("REGISTRY_PASSWORD='hunter two'", "hunter"),
        ("proxy https://user:hunter2@proxy.example:3128", "hunter2"),
        ("event='x' api_key=k-123456", "k-123456"),
        ("the value is s3cr3t-value here", "s3cr3t-value"),
    ],
)
def test_secret_is_masked(text: str, secret: str) -> None:
    found = scrub(text, {"MY_API_TOKEN": "s3cr3t-value", "HOME": "/home/anna"})
    assert secret not in found
    assert "***" in found


def test_what_is_no_secret_stays() -> None:
    text = "session 0123456789abcdef on node one at 10.0.0.1:7443 took 12 ms, /home/anna, port 8080"
    assert scrub(text, {"HOME": "/home/anna", "A_TOKEN": "1"}) == text


def test_a_long_word_of_a_node_takes_no_time() -> None:
    assert scrub("a" * 1_000_000, {}) == "a" * 1_000_000
    assert "geheim" not in scrub("x" * 100_000 + "token=geheim", {})
