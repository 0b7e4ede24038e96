"""What people are told when a registry does not do what a build wanted."""

from __future__ import annotations

import pytest

from offload_builder.node.registrytrouble import RegistryTrouble, Whose, explain

_PULL = (
    "r.example/a/b:1: failed to resolve source metadata for r.example/a/b:1: failed to do request: "
    'Head "https://r.example/v2/a/b/manifests/1": '
)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("dial tcp 1.2.3.4:443: connect: connection refused", "is down or not reachable"),
        ("dial tcp: lookup r.example on 1.1.1.1:53: no such host", "cannot find r.example in DNS"),
        ("tls: x509: certificate signed by unknown authority", "does not trust the certificate of"),
        ("x509: certificate has expired or is not yet valid", "is not valid at this time"),
        ("x509: certificate is valid for a, not r.example", "is not good for this name"),
        ("http: server gave HTTP response to HTTPS client", "speaks plain HTTP"),
        ("net/http: TLS handshake timeout", "does not answer"),
        ("unexpected status: 503 Service Unavailable", "fails or has too many requests"),
    ],
)
def test_faults_of_registries_have_a_remedy(words: str, sentence: str) -> None:
    found = explain(_PULL + words, [])
    assert found is not None
    assert sentence in found[0]
    assert not found[1]
    assert len(found[0]) < 250


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("dial tcp 1.2.3.4:9: connect: connection refused", "1.2.3.4:9 is down or not reachable"),
        ("lookup a.example on 10.0.0.2:53: no such host", "cannot find a.example in DNS"),
        ("lookup a.example on 10.0.0.2:53: i/o timeout", "cannot find a.example in DNS"),
        ("dial tcp 10.1.1.1:443: i/o timeout", "10.1.1.1:443 does not answer"),
        (
            "access 'https://u:p@g.example:9/x.git/': Failed: Couldn't connect to server",
            "g.example:9 is down or not reachable",
        ),
        (
            "unable to access 'https://g.example/x.git/': Could not resolve host: g.example",
            "cannot find g.example in DNS",
        ),
        ("ssh: connect to host g.example port 22: Connection refused", "g.example is down"),
        (
            "ssh: Could not resolve hostname g.example: Name or service not known",
            "cannot find g.example in DNS",
        ),
        ("git@g.example: Permission denied (publickey).", "g.example refused all keys"),
        ("Permission denied (publickey,password).", "the git server refused all keys"),
        (
            "could not read Username for 'https://g.example': terminal prompts disabled",
            "--secret id=GIT_AUTH_TOKEN.g.example,env=NAME",
        ),
        (
            "fatal: Authentication failed for 'https://g.example:9/x.git/'",
            "the repository at g.example:9 is not there or needs a login",
        ),
    ],
)
def test_faults_of_other_servers_have_one_too(message: str, sentence: str) -> None:
    found = explain(f"failed to load cache key: {message}", [])
    assert found is not None
    assert sentence in found[0]
    assert not found[1]
    assert "registry" not in found[0] and ":p@" not in found[0]


def test_what_is_not_about_a_registry_is_left_alone() -> None:
    for message in ("dockerfile parse error on line 1", "connection refused", "", "not found"):
        assert explain(message, []) is None


def test_refusal_names_whose_login_it_was() -> None:
    message = (
        "failed to push r.example/a/b:1: unexpected status from POST request to"
        " https://r.example/v2/a/b/blobs/uploads/: 401 Unauthorized"
    )
    for whose, words in (
        (Whose.PERSON, "refused your login as ann for a/b"),
        (Whose.POOL, "refused the pool's login for a/b"),
        (Whose.NOBODY, "r.example/a/b needs a login and there is none"),
    ):
        other = RegistryTrouble("other.example", "a/b", Whose.PERSON)
        trouble = RegistryTrouble("r.example", "a/b", whose, "ann")
        found = explain(message, [other, trouble])
        assert found is not None
        assert words in found[0]
        assert found[1]
    assert explain(message, []) is not None


def test_what_the_policy_refused_is_no_matter_of_logins() -> None:
    cause = "egress: auth.example was refused: no rule allows it"
    for whose in Whose:
        trouble = RegistryTrouble("r.example", "a/b", whose, "", cause, denied=False)
        assert str(trouble) == f"{cause}; the login at r.example was not possible"
        assert explain(f"failed to fetch oauth token: {trouble}", [trouble]) == (
            str(trouble),
            False,
        )


def test_docker_hub_has_its_short_name() -> None:
    text = str(RegistryTrouble("registry-1.docker.io", "team/app", Whose.PERSON, "ann"))
    assert text.startswith("docker.io refused your login as ann for team/app")
    assert "`docker login`" in text
