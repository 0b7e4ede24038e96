from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.urls.locations import OddSourceError, location_of, shown_url

COMMIT = "#" + "a" * 40


@pytest.mark.parametrize(
    ("identifier", "attributes", "place"),
    [
        (
            "docker-image://docker.io/library/alpine:3",
            {},
            ("image", "registry-1.docker.io", 443, "docker.io/library/alpine:3"),
        ),
        ("docker-image://alpine", {}, ("image", "registry-1.docker.io", 443, "alpine")),
        ("docker-image://team/app", {}, ("image", "registry-1.docker.io", 443, "team/app")),
        ("docker-image://R.test:5000/a:1", {}, ("image", "r.test", 5000, "R.test:5000/a:1")),
        ("docker-image://localhost/a", {}, ("image", "localhost", 443, "localhost/a")),
        ("docker-image://[::1]:5000/a", {}, ("image", "::1", 5000, "[::1]:5000/a")),
        (
            "docker-image+blob://r.test/a@sha256:1",
            {},
            ("image", "r.test", 443, "r.test/a@sha256:1"),
        ),
        (
            "https://u:p@Host.test:443/a?token=x#y",
            {},
            ("http", "host.test", 443, "https://host.test/a"),
        ),
        ("http://host.test:8080/", {}, ("http", "host.test", 8080, "http://host.test:8080/")),
        ("https://[2001:db8::1]/a", {}, ("http", "2001:db8::1", 443, "https://[2001:db8::1]/a")),
        (
            f"git://g.test/a.git{COMMIT}",
            {"git.fullurl": "https://u:p@g.test/a.git"},
            ("git", "g.test", 443, "https://g.test/a.git"),
        ),
        ("git://g.test/a.git", {}, ("git", "g.test", 443, "https://g.test/a.git")),
        ("git://git://g.test/a.git", {}, ("git", "g.test", 9418, "git://g.test/a.git")),
        (
            "git://a.test:x@g.test/a.git",
            {"git.fullurl": "a.test:x@g.test/a.git"},
            ("git", "g.test", 443, "https://g.test/a.git"),
        ),
        (
            "git://g.test:8443/a.git",
            {"git.fullurl": "g.test:8443/a.git"},
            ("git", "g.test", 8443, "https://g.test:8443/a.git"),
        ),
        (
            "git://g.test/a.git",
            {"git.fullurl": "git@g.test:team/a.git#main"},
            ("git", "g.test", 22, "g.test:team/a.git"),
        ),
        (
            "git://g.test/a.git",
            {"git.fullurl": "ssh://git@g.test:2222/a.git"},
            ("git", "g.test", 2222, "ssh://g.test:2222/a.git"),
        ),
    ],
)
def test_a_source_is_read(
    identifier: str, attributes: dict[str, str], place: tuple[str, str, int, str]
) -> None:
    found = location_of(identifier, attributes)
    assert (found.kind, found.host, found.port, found.url) == place


@pytest.mark.parametrize("identifier", ["local://context", "oci-layout://x/y@sha256:1"])
def test_what_comes_with_the_build_needs_no_network(identifier: str) -> None:
    assert location_of(identifier, {}).is_local


@pytest.mark.parametrize(
    "identifier",
    ["", "alpine", "ftp://host.test/a", "https://", "https:///a", "http://h:port/", "magic://x",
     "docker-image://h.test:x/a", "git://"],
)  # fmt: skip
def test_what_cannot_be_understood_is_an_error(identifier: str) -> None:
    with pytest.raises(OddSourceError):
        location_of(identifier, {})


@given(st.text(max_size=80), st.sampled_from(["https://", "git://", "docker-image://", ""]))
def test_any_identifier_is_read_or_refused(text: str, scheme: str) -> None:
    try:
        place = location_of(scheme + text, {"git.fullurl": text})
    except OddSourceError:
        return
    assert place.host
    assert place.port > 0


def test_shown_addresses_hold_no_secret() -> None:
    shown = shown_url("https://name:secret@h.test/a?X-Signature=secret#secret")
    assert "secret" not in shown


@pytest.mark.parametrize(
    "identifier",
    ["https://name:sec/ret@h.test/a", "https://name:secret@h.test:secret/", "ssh://a:secret@h:x/",
     "secret-without-a-kind", "https://a@secret@h.test/", "https://h.test\\@secret/"],
)  # fmt: skip
def test_an_address_that_is_not_understood_is_not_shown(identifier: str) -> None:
    with pytest.raises(OddSourceError) as caught:
        location_of(identifier, {})
    assert "sec" not in str(caught.value)


def test_nothing_of_an_address_reaches_a_terminal() -> None:
    for identifier in ("https://h.test/\x1b[2J\n", "docker-image://h.test/a\x1b", "local://\x1b"):
        assert location_of(identifier, {}).url.isprintable()
    assert location_of("git://x", {"git.fullurl": "git@h.test:a\x1b"}).url == "h.test:a?"


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        (
            "docker.io/library/alpine:3",
            "https://registry-1.docker.io/v2/library/alpine/manifests/3",
        ),
        ("alpine", "https://registry-1.docker.io/v2/library/alpine/manifests/latest"),
        ("R.test:5000/a/b:1@sha256:ab", "https://r.test:5000/v2/a/b/manifests/sha256:ab"),
    ],
)
def test_an_image_is_at_a_url_of_its_registry(reference: str, url: str) -> None:
    assert str(location_of(f"docker-image://{reference}", {}).web) == url
