"""A docker context that names an engine behind mutual TLS."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from offload_client.load.loader import load_image
from offload_core.errors import ImageLoadError
from tests.fixtures.authority import Authority
from tests.fixtures.engine import DockerEngine
from tests.fixtures.ociimages import MemorySource, busybox_layer
from tests.fixtures.ports import free_port


def make_context(home: Path, name: str, host: str, certificates: Path) -> None:
    """Write a docker context as `docker context create` does, and make it the current one."""
    folder = hashlib.sha256(name.encode()).hexdigest()
    store = home / ".docker" / "contexts"
    meta, tls = store / "meta" / folder, store / "tls" / folder / "docker"
    meta.mkdir(parents=True)
    tls.mkdir(parents=True)
    endpoint = {"Host": host, "SkipTLSVerify": False}
    (meta / "meta.json").write_text(
        json.dumps({"Name": name, "Metadata": {}, "Endpoints": {"docker": endpoint}})
    )
    for source, target in (("ca", "ca"), ("client", "cert"), ("client-key", "key")):
        (tls / f"{target}.pem").write_bytes((certificates / f"{source}.pem").read_bytes())
    (home / ".docker" / "config.json").write_text(json.dumps({"currentContext": name}))


async def test_context_with_certificates_loads_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    authority.issue("server")
    authority.issue("client")
    host = f"tcp://127.0.0.1:{free_port()}"
    # Set by many company networks; must not replace the context's own authority.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
    flags: list[str | Path] = ["-H", host, "--tlsverify"]
    flags += ["--tlscacert", tmp_path / "ca.pem", "--tlscert", tmp_path / "server.pem"]
    flags += ["--tlskey", tmp_path / "server-key.pem"]
    source = MemorySource()
    image = source.add_image([busybox_layer()])
    with DockerEngine("containerd", arguments=flags) as engine:
        home = tmp_path / "home"
        make_context(home, "far", host, tmp_path)
        result = await load_image(
            source, image.digest, ["app"], environment={"HOME": str(home)}, progress=lambda _: None
        )
        assert result.layers_received == 1
        assert engine.inspect("app")["Id"] == image.digest
        Authority(tmp_path)
        make_context(home, "foreign", host, tmp_path)
        with pytest.raises(ImageLoadError, match=r'docker context "foreign".*certificate verify'):
            await load_image(
                source,
                image.digest,
                ["app"],
                environment={"HOME": str(home)},
                progress=lambda _: None,
            )
