"""Units, digests, modes, addresses, versions."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_core import API_VERSION, VERSION
from offload_core.digest import digest_hex, is_digest, sha256_digest
from offload_core.errors import AuthenticationError, ConfigError, VersionError
from offload_core.filemode import (
    MODE_CHAR_DEVICE,
    MODE_DEVICE,
    MODE_DIR,
    MODE_NAMED_PIPE,
    MODE_SETGID,
    MODE_SETUID,
    MODE_SOCKET,
    MODE_STICKY,
    MODE_SYMLINK,
    go_file_mode,
    is_regular,
)
from offload_core.tls import Identity, KeyPair
from offload_core.trust import join_address, split_address, token_fingerprint
from offload_core.units import format_duration, format_size, parse_duration, parse_size
from offload_core.versions import VERSION_KEY, call_metadata, check_version


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("512", 512), ("1k", 1000), ("1KiB", 1024), ("1.5 GB", 1_500_000_000),
     ("20GiB", 20 << 30), (" 2 mib ", 2 << 20), ("1T", 10**12), ("7b", 7)],
)  # fmt: skip
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 2", "1e3", "5PB", "1,5GB", "0x10"])
def test_wrong_sizes(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("30s", 30), ("1h30m", 5400), ("250ms", 0.25), ("7d", 604_800), ("1.5s", 1.5), (" 2m ", 120)],
)
def test_durations(text, value):
    assert parse_duration(text) == value


@pytest.mark.parametrize("text", ["", "5", "s", "1h 30m", "-1s", "1s x", "x1s", "1y"])
def test_wrong_durations(text):
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0B"), (999, "999B"), (12_340, "12.34kB"), (101_900_000, "101.9MB"), (5e12, "5TB"),
     (5e15, "5000TB")],
)  # fmt: skip
def test_sizes_are_shown_as_docker_does(value, text):
    assert format_size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.31, "0.3s"), (59.9, "59.9s"), (125, "2m5s"), (11_520, "3h12m")]
)
def test_durations_are_shown(value, text):
    assert format_duration(value) == text


@given(st.binary(max_size=100))
def test_digest_is_sha256_of_the_bytes(data):
    digest = sha256_digest(data)
    assert is_digest(digest)
    assert digest_hex(digest) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "text",
    ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 64 + "\n",
     "sha512:" + "a" * 64, "sha256:../../etc/passwd", "a" * 64],
)  # fmt: skip
def test_what_is_no_digest_never_becomes_part_of_a_path(text):
    assert not is_digest(text)
    with pytest.raises(ValueError, match="not a sha256 digest"):
        digest_hex(text)


@pytest.mark.parametrize(
    ("posix", "expected"),
    [
        (stat.S_IFREG | 0o644, 0o644),
        (stat.S_IFDIR | 0o755, MODE_DIR | 0o755),
        (stat.S_IFLNK | 0o777, MODE_SYMLINK | 0o777),
        (stat.S_IFCHR | 0o600, MODE_DEVICE | MODE_CHAR_DEVICE | 0o600),
        (stat.S_IFBLK | 0o600, MODE_DEVICE | 0o600),
        (stat.S_IFIFO | 0o600, MODE_NAMED_PIPE | 0o600),
        (stat.S_IFSOCK | 0o600, MODE_SOCKET | 0o600),
        (stat.S_IFREG | 0o7755, MODE_SETUID | MODE_SETGID | MODE_STICKY | 0o755),
    ],
)
def test_modes_are_gos(posix, expected):
    assert go_file_mode(posix) == expected
    assert is_regular(expected) == stat.S_ISREG(posix)


def test_mode_of_a_real_file(tmp_path):
    (tmp_path / "f").touch(0o640)
    assert go_file_mode((tmp_path / "f").stat().st_mode) & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 7443)),
        ("host:1", ("host", 1)),
        ("host:", ("host", 7443)),
        ("https://host:443/", ("host", 443)),
        (" 10.0.0.1:80 ", ("10.0.0.1", 80)),
        ("[::1]:5", ("::1", 5)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", 7443)),
        ("host:0", ("host", 0)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_addresses(text, expected):
    assert split_address(text) == expected
    assert split_address(join_address(*expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":80", "host:x", "host:65536", "host:-1", "host:1:2", "::1", "[::1", "[::1]x:5", "[]:5",
     "http://host", "host/path", "user@host:1", "ho st:1", "host:\uff11"],
)  # fmt: skip
def test_wrong_addresses(text):
    with pytest.raises(ConfigError, match="is not an address"):
        split_address(text)


def test_fingerprint_of_tokens():
    assert token_fingerprint(" ofl_id_se_cret_" + "a" * 32 + "\n") == "a" * 32
    for text in ("", "ofl_id_secret_short", "xyz_id_secret_" + "a" * 32, "ofl_" + "a" * 32):
        with pytest.raises(AuthenticationError, match="not a token"):
            token_fingerprint(text)


def test_versions_in_calls():
    check_version(call_metadata(("a", "b")), me="this gateway")
    for metadata in (None, (), ((VERSION_KEY, "0"),), ((VERSION_KEY, "x"),)):
        with pytest.raises(VersionError, match="this command is too old for this gateway"):
            check_version(metadata, me="this gateway")
    with pytest.raises(VersionError, match="this command is newer than this node"):
        check_version(((VERSION_KEY, str(API_VERSION + 1)),), me="this node")


def test_version_is_that_of_the_distribution():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"', text, re.MULTILINE)[1] == VERSION


@given(st.text(min_size=1, max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_identity_survives_the_certificate(name, token_id, role):
    # Surrogates cannot be in a certificate.
    try:
        (name + token_id + role).encode()
    except UnicodeEncodeError:
        return
    identity = Identity("member", name, token_id, role)
    back = Identity.parse(identity.uri())
    assert back == identity


@pytest.mark.parametrize("uri", ["", "https://member/x", "offload://root/x", "spiffe://member/x"])
def test_foreign_identities_are_none(uri):
    assert Identity.parse(uri) is None


def test_key_pair_never_shows_its_key():
    assert "secret" not in repr(KeyPair(b"certificate", b"secret", b"ca"))
