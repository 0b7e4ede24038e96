"""The administrator's registries: what BuildKit is told, and what the pool reads itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.daemon_config import DaemonSettings, daemon_toml
from offload_builder.node.config import NodeConfig
from offload_builder.node.registries import Registries
from offload_cache.nodestore import NodeStore
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, text: str) -> Path:
    path = folder / "registries.toml"
    path.write_text(text)
    return path


FILE = """
[registry."docker.io"]
mirrors = ["mirror.example/hub", "localhost:5000"]
username = "pool"
password_file = "/etc/pool/password"

[registry."mirror.example"]
ca = ["/etc/pool/ca.pem"]
credential_helper = "example"

[registry."direct.example:5000"]
http = true
base_images = false
"""


def test_sources_are_docker_hub_and_the_configured_hosts(tmp_path):
    found = {source.host: source for source in Registries(write(tmp_path, FILE)).sources()}
    assert set(found) == {"docker.io", "mirror.example"}
    mirror, local, origin = found["docker.io"].endpoints
    assert mirror[0].base_url == "https://mirror.example/v2/hub"
    assert mirror[1] is not None
    assert mirror[1].helper == "example"
    assert local[0].base_url == "http://localhost:5000/v2"
    assert origin[0].base_url == "https://registry-1.docker.io/v2"
    assert origin[1] is not None
    assert origin[1].username == "pool"
    assert [source.host for source in Registries(None).sources()] == ["docker.io"]


async def test_buildkit_is_told_the_way_and_no_login(tmp_path):
    registries = Registries(write(tmp_path, FILE.replace('ca = ["/etc/pool/ca.pem"]', "")))
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path)
    async with (
        NodeStore(tmp_path / "cache") as store,
        registries.mirrors(config, store.database) as mirrors,
    ):
        cache = await store.project("web")
        async with registries.serve(mirrors, "10.1.2.3:4000", cache.store, trusted=True) as bases:
            assert bases.images is not None
            hub = bases.registries["docker.io"].mirrors
            assert hub[0].startswith("10.1.2.3:4000/")
            assert hub[0].endswith("/base/docker.io")
            assert hub[1:] == ("mirror.example/hub", "localhost:5000")
            assert bases.registries["direct.example:5000"].mirrors == ()
            assert bases.registries["10.1.2.3:4000"].http
            settings = DaemonSettings(tmp_path, registries=bases.registries)
            text = daemon_toml(settings, tmp_path / "bk.sock", tmp_path / "runc")
            assert "pool" not in text.replace(str(tmp_path), "")
            async with registries.serve(
                mirrors, "10.1.2.3:4000", cache.store, trusted=True
            ) as other:
                assert other.registries["docker.io"].mirrors[0] != hub[0]


async def test_login_can_be_for_some_projects_only(tmp_path):
    text = """
[registry."private.example"]
username = "pool"
password_env = "POOL_PASSWORD"
projects = ["shop"]

[registry."front.example"]
mirrors = ["private.example/front"]
"""
    registries = Registries(write(tmp_path, text))
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path)
    async with (
        NodeStore(tmp_path / "cache") as store,
        registries.mirrors(config, store.database) as mirrors,
    ):
        for project, cached in (("shop", True), ("other", False)):
            cache = await store.project(project)
            async with registries.serve(
                mirrors, "127.0.0.1:4000", cache.store, trusted=True
            ) as bases:
                for host in ("private.example", "front.example"):
                    named = bases.registries[host].mirrors
                    assert any("/base/" in mirror for mirror in named) is cached
                assert len(bases.registries["docker.io"].mirrors) == 1
                assert bases.images is not None
                assert ("private.example" in bases.images._upstreams) is cached


async def test_nothing_is_cached_when_it_is_turned_off(tmp_path):
    registries = Registries(None)
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path, base_images=False)
    async with (
        NodeStore(tmp_path / "cache") as store,
        registries.mirrors(config, store.database) as mirrors,
    ):
        cache = await store.project("web")
        async with registries.serve(mirrors, "127.0.0.1:1", cache.store, trusted=True) as bases:
            assert bases.registries == {}
            assert bases.images is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[registry."a"]\npassword = "x"', "unknown key 'password'"),
        ('[registry."a"]\nhttp = "yes"', "http of registry 'a' must be true or false"),
        ('[registry."a"]\nmirrors = "b"', "must be a list of texts"),
        ('[registry."a"]\nmirrors = [1]', "must be a list of texts"),
        ('[registry."a"]\nusername = "x"', "needs one of password_file"),
        ("registry = 1", "one table per host"),
    ],
)
def test_wrong_settings_are_refused_with_their_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Registries(write(tmp_path, text))
    assert "registries.toml" in str(caught.value)
