"""Which engine the user means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from offload_client.load.endpoint import EngineTls, resolve_endpoint
from offload_core.errors import ConfigError


def add_context(home: Path, name: str, host: str, *, certificates: bool = False) -> None:
    folder = hashlib.sha256(name.encode()).hexdigest()
    meta = home / ".docker" / "contexts" / "meta" / folder
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(
        json.dumps({"Name": name, "Metadata": {}, "Endpoints": {"docker": {"Host": host}}})
    )
    if certificates:
        (home / ".docker" / "contexts" / "tls" / folder / "docker").mkdir(parents=True)


def use_context(home: Path, name: str) -> None:
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker" / "config.json").write_text(json.dumps({"currentContext": name}))


def test_default_is_the_system_socket(tmp_path: Path) -> None:
    endpoint = resolve_endpoint({"HOME": str(tmp_path)})
    assert endpoint.host == "unix:///var/run/docker.sock"
    assert endpoint.tls is None


def test_docker_host_wins_over_contexts(tmp_path: Path) -> None:
    use_context(tmp_path, "elsewhere")
    environment = {
        "HOME": str(tmp_path),
        "DOCKER_HOST": "unix:///run/x.sock",
        "DOCKER_CONTEXT": "other",
    }
    assert str(resolve_endpoint(environment)) == "unix:///run/x.sock (from DOCKER_HOST)"


def test_current_context_of_the_configuration_is_used(tmp_path: Path) -> None:
    add_context(tmp_path, "colima", "unix:///home/u/.colima/docker.sock")
    use_context(tmp_path, "colima")
    endpoint = resolve_endpoint({"HOME": str(tmp_path)})
    assert endpoint.host == "unix:///home/u/.colima/docker.sock"
    assert endpoint.origin == 'docker context "colima"'


def test_context_variable_wins_over_the_configuration(tmp_path: Path) -> None:
    add_context(tmp_path, "one", "unix:///one")
    add_context(tmp_path, "two", "tcp://two:2376", certificates=True)
    use_context(tmp_path, "one")
    endpoint = resolve_endpoint({"HOME": str(tmp_path), "DOCKER_CONTEXT": "two"})
    assert endpoint.host == "tcp://two:2376"
    assert endpoint.tls is not None
    assert endpoint.tls.verify


def test_default_context_is_the_system_socket(tmp_path: Path) -> None:
    use_context(tmp_path, "default")
    assert resolve_endpoint({"HOME": str(tmp_path)}).origin == "docker's default"


def test_missing_context_is_named(tmp_path: Path) -> None:
    use_context(tmp_path, "gone")
    with pytest.raises(ConfigError, match=r'context "gone".*does not exist'):
        resolve_endpoint({"HOME": str(tmp_path)})


def test_damaged_context_is_named(tmp_path: Path) -> None:
    add_context(tmp_path, "odd", "")
    use_context(tmp_path, "odd")
    with pytest.raises(ConfigError, match='"odd" names no engine'):
        resolve_endpoint({"HOME": str(tmp_path)})


@pytest.mark.parametrize("verify", [True, False])
def test_tls_variables_are_honoured(tmp_path: Path, verify: bool) -> None:
    environment = {
        "HOME": str(tmp_path),
        "DOCKER_HOST": "tcp://h:2376",
        "DOCKER_CERT_PATH": str(tmp_path / "certs"),
        ("DOCKER_TLS_VERIFY" if verify else "DOCKER_TLS"): "1",
    }
    assert resolve_endpoint(environment).tls == EngineTls(tmp_path / "certs", verify)
    del environment["DOCKER_CERT_PATH"]
    assert resolve_endpoint(environment).tls == EngineTls(tmp_path / ".docker", verify)
