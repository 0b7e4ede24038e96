"""The administrator's registries: what BuildKit is told, and what the pool reads itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.daemon_config import DaemonSettings, daemon_toml
from offload_builder.node.config import NodeConfig
from offload_builder.node.pushtargets import push_targets, split_name
from offload_builder.node.registries import Registries
from offload_cache.mirror.connection import new_session
from offload_cache.nodestore import NodeStore
from offload_core.errors import ConfigError
from offload_proto.v1.build_spec_pb2 import BuildSpec, Output

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
    found = {source.host: source for source in Registries(write(tmp_path, FILE)).sources("web")}
    assert set(found) == {"docker.io", "mirror.example"}
    mirror, local, origin = found["docker.io"].endpoints
    assert mirror[0].base_url == "https://mirror.example/v2/hub"
    assert mirror[1][0].helper == "example"
    assert local[0].base_url == "http://localhost:5000/v2"
    assert origin[0].base_url == "https://registry-1.docker.io/v2"
    assert origin[1][0].username == "pool"
    assert [source.host for source in Registries(None).sources("web")] == ["docker.io"]


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
            assert list(bases.registries) == ["127.0.0.1:1"]
            assert bases.images is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[registry."a"]\npassword = "x"', "unknown key 'password'"),
        ('[registry."a"]\nhttp = "yes"', "registry 'a': http must be true or false"),
        ('[registry."a"]\nmirrors = "b"', "must be a list of texts"),
        ('[registry."a"]\nmirrors = [1]', "must be a list of texts"),
        ('[registry."a"]\nusername = "x"', "needs one of password_file"),
        ("registry = 1", "one table per host"),
        ('[registry."a"]\nlogin = 1', "write each login as a table"),
        ('[[registry."a".login]]\nhttp = true', "login: unknown key 'http'"),
        ('[[registry."a".login]]\ncredential_helper = "x"\nusername = "u"', "needs a username"),
        ('[registry."a"]\ncredential_command = ["x"]\ncredential_lifetime = "soon"', "soon"),
    ],
)
def test_wrong_settings_are_refused_with_their_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Registries(write(tmp_path, text))
    assert "registries.toml" in str(caught.value)


async def test_logins_are_chosen_by_project_and_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOP", "s1")
    monkeypatch.setenv("ALL", "a1")
    text = """
[registry."r.example"]
[[registry."r.example".login]]
username = "shop"
password_env = "SHOP"
projects = ["shop-*"]
repositories = ["shop/**"]
push = ["shop/app"]
[[registry."r.example".login]]
username = "all"
password_env = "ALL"
push = ["all/*"]
"""
    registries = Registries(write(tmp_path, text))
    assert registries.withheld == {"SHOP", "ALL"}
    async with new_session() as session:

        async def granted(project: str, *scopes: str, trusted: bool = True):
            logins = registries.logins(project, session, trusted=trusted)
            grant = await logins.grant("r.example", scopes)
            return None if grant is None else (grant.login.username, *grant.scopes)

        pull, push = "repository:shop/app:pull", "repository:shop/app:pull,push"
        assert await granted("shop-1", push) == ("shop", push)
        assert await granted("shop-1", push.replace("app", "db")) == (
            "shop", pull.replace("app", "db"),
        )  # fmt: skip
        assert await granted("web", push) == ("all", pull)
        assert await granted("web", "repository:all/x/y:push") is None
        # Layers of other repositories are mounted where they may be read.
        both = await granted("shop-1", "repository:other/x:pull", push)
        assert both == ("shop", push)
        for scope in ("registry:catalog:*", "repository:shop/app:delete", "repository:x", ""):
            assert await granted("shop-1", scope) is None
        assert await granted("shop-1", pull, trusted=False) is None
        assert await registries.logins("web", session, trusted=True).whole("r.example") is None


def test_docker_hub_is_found_by_the_address_of_its_registry(tmp_path):
    registries = Registries(write(tmp_path, '[registry."docker.io"]\ninsecure = true\n'))
    endpoint = registries.reach("registry-1.docker.io")
    assert (endpoint.base_url, endpoint.insecure) == ("https://registry-1.docker.io/v2", True)
    assert registries.reach("localhost:5000").http
    assert not registries.reach("other.example").http


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("app", ("registry-1.docker.io", "library/app")),
        ("team/app:1", ("registry-1.docker.io", "team/app")),
        ("docker.io/app@sha256:1", ("registry-1.docker.io", "library/app")),
        ("localhost/app", ("localhost", "app")),
        ("r.example:5000/a/b/c:tag", ("r.example:5000", "a/b/c")),
    ],
)
def test_image_names_lead_to_registries(name, expected):
    assert split_name(name) == expected


def test_everything_that_is_pushed_is_known_at_the_start():
    spec = BuildSpec(tags=["r.example/a:1", "r.example/b", "r.example/a:2"])
    spec.outputs.add(type=Output.TYPE_REGISTRY)
    spec.outputs.add(type=Output.TYPE_REGISTRY, attributes={"name": "other.example/c"})
    spec.outputs.add(type=Output.TYPE_LOCAL)
    spec.cache_exports.add(type="registry", attributes={"ref": "cache.example/d:cache"})
    assert push_targets(spec) == [
        ("r.example", "a"), ("r.example", "b"), ("other.example", "c"), ("cache.example", "d"),
    ]  # fmt: skip


async def test_helper_is_asked_for_each_registry_and_its_answer_goes_nowhere_else(
    tmp_path, monkeypatch
):
    helper = tmp_path / "docker-credential-all"
    helper.write_text('#!/bin/sh\nread h\nprintf \'{"Username":"u","Secret":"of %s"}\' "$h"\n')
    helper.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    table = '[registry."HOST"]\ncredential_helper = "all"\npush = ["**"]\n'
    text = table.replace("HOST", "a.example") + table.replace("HOST", "b.example")
    registries = Registries(write(tmp_path, text))
    async with new_session() as session:
        logins = registries.logins("web", session, trusted=True)
        for host in ("a.example", "b.example"):
            grant = await logins.grant(host, ["repository:x:pull"])
            assert grant is not None
            whole = await logins.whole(host)
            assert whole is not None
            assert grant.login.secret == whole.secret == f"of {host}"
