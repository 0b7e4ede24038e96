"""Which pulls of a session's engine are looked at, and whose login is used."""

from __future__ import annotations

import base64
import json

import pytest

from offload_builder.node.mounts.tree import Entry, Kind, Tree
from offload_builder.node.sessions.guard.images import _has_login, _wanted


@pytest.mark.parametrize(
    ("image", "tag", "name"),
    [
        ("app", "v1", "docker.io/library/app:v1"),
        ("team/app:v1", "", "docker.io/team/app:v1"),
        ("127.0.0.1:5000/app", "v1", "127.0.0.1:5000/app:v1"),
        ("app", "", None),
        ("127.0.0.1:5000/app", "", None),
        ("app", "sha256:" + "0" * 64, None),
        ("app@sha256:" + "0" * 64, "", None),
        ("Not/Valid", "x", None),
        ("", "", None),
    ],
)
def test_only_pulls_of_one_image_by_its_tag_are_looked_at(image, tag, name):
    assert _wanted({"fromImage": [image], "tag": [tag]}) == name


@pytest.mark.parametrize(
    ("login", "has"),
    [
        ({}, False),
        ({"serveraddress": "https://index.docker.io/v1/"}, False),
        ({"username": "", "password": ""}, False),
        ({"username": "ann", "password": "x"}, True),
        ({"identitytoken": "t"}, True),
        (["odd"], True),
    ],
)
def test_a_login_of_the_member_is_never_replaced(login, has):
    header = base64.urlsafe_b64encode(json.dumps(login).encode()).decode()
    assert _has_login(header) is has
    assert _has_login(header.rstrip("=")) is has


def test_owners_move_between_namespaces_and_none_leaves_its_own():
    tree = Tree(
        [
            Entry(Kind.FILE, "a", 0o644, 300_000, 301_000, 0, xattrs={"user.a": b"1"}),
            Entry(Kind.FILE, "b", 0o644, 0, 400_000, 0, xattrs={"security.capability": b"1"}),
        ]
    )
    tree.shift_owners(-300_000)
    assert [(entry.uid, entry.gid) for entry in tree.entries] == [(0, 1000), (0, 0)]
    assert [entry.xattrs for entry in tree.entries] == [{"user.a": b"1"}, {}]
    tree.entries[0].gid = 70_000
    tree.shift_owners(500_000)
    assert [(entry.uid, entry.gid) for entry in tree.entries] == [(500_000, 500_000)] * 2
