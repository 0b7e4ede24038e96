"""What a node notices of specifications of devices, and who gets to see them."""

from __future__ import annotations

from pathlib import Path

from offload_builder.buildkit.client import Device
from offload_builder.node.config import NodeConfig
from offload_builder.node.devicespecs import fingerprint, read_specifications, write_copies
from offload_builder.node.devicesurvey import device_folders, devices_message
from offload_builder.node.entitlements import Permitted
from offload_builder.node.trustdomain import TrustDomain


def test_fingerprint_follows_specifications_and_nothing_else(tmp_path: Path) -> None:
    folders = [tmp_path / "missing", tmp_path]
    (tmp_path / "README").write_text("x")
    assert fingerprint(folders) == ()
    (tmp_path / "a.json").write_text("{}")
    first = fingerprint(folders)
    assert len(first) == 1
    (tmp_path / "README").write_text("xy")
    assert fingerprint(folders) == first
    (tmp_path / "b.yaml").symlink_to(tmp_path / "target")
    # It leads nowhere yet.
    assert fingerprint(folders) == first
    (tmp_path / "target").write_text("kind: a/b")
    assert len(fingerprint(folders)) == 2
    (tmp_path / "a.json").unlink()
    assert fingerprint(folders) != first


def test_devices_are_told_by_name() -> None:
    message = devices_message([Device("b/c=1", "fast"), Device("a/b=0", auto_allowed=True)])
    assert [(item.name, item.alias) for item in message.devices] == [
        ("a/b=0", ""),
        ("b/c=1", "fast"),
    ]


def test_only_buildkits_whose_builds_may_have_devices_see_them(tmp_path: Path) -> None:
    config = NodeConfig(gateway="g:1", data=tmp_path, cdi_spec_dirs=[Path("/a"), Path("/b")])
    member, guest = TrustDomain("shop"), TrustDomain("shop", "untrusted-eve")
    assert device_folders(config, member, Permitted(("device=a/b",))) == (
        tmp_path / "devices" / "0",
        tmp_path / "devices" / "1",
    )
    assert device_folders(config, member, Permitted(("network.host",))) == ()
    assert device_folders(config, guest, Permitted(("device",))) == ()


def test_copies_are_those_that_are_wanted_and_keep_their_directories_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.json").write_text(folder.name)
    (folders[1] / "big.yaml").write_bytes(bytes((4 << 20) + 1))
    given = read_specifications(folders)
    assert [item.path for item in given] == [folder / "x.json" for folder in folders]
    copies = tmp_path / "copies"
    write_copies(copies, 2, given)
    assert [(copies / place / "x.json").read_text() for place in "01"] == ["a", "b"]
    before = (copies / "0" / "x.json").stat().st_ino
    write_copies(copies, 2, given[:1])
    assert [str(path.relative_to(copies)) for path in copies.rglob("*.json")] == ["0/x.json"]
    # What is as it was is left alone: BuildKits that run need not read it again.
    assert (copies / "0" / "x.json").stat().st_ino == before
