"""Docker's proxies become build arguments; the comparison with buildx is in the parity suite."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from offload_client.build.proxyargs import with_proxies

if TYPE_CHECKING:
    from pathlib import Path

ENTRY = {"httpProxy": "h", "httpsProxy": "s", "noProxy": "n", "ftpProxy": "f", "allProxy": "a"}
ALL = {"HTTP_PROXY": "h", "HTTPS_PROXY": "s", "NO_PROXY": "n", "FTP_PROXY": "f"}


def found(
    folder: Path, config: Any, given: dict[str, str] | None = None, **environment: str
) -> tuple[dict[str, str], str]:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return with_proxies(given or {}, {"DOCKER_CONFIG": str(folder), **environment})


def test_every_key_has_its_argument(tmp_path: Path) -> None:
    assert found(tmp_path, {"proxies": {"default": ENTRY}}) == (ALL, "")
    assert found(tmp_path, {"proxies": {"default": {"httpProxy": ""}}}) == ({}, "")
    assert found(tmp_path, {}) == ({}, "")


def test_argument_of_the_command_line_counts(tmp_path: Path) -> None:
    config = {"proxies": {"default": {"httpProxy": "h"}}}
    assert found(tmp_path, config, {"HTTP_PROXY": ""})[0] == {"HTTP_PROXY": ""}
    both = {"HTTP_PROXY": "h", "http_proxy": "mine"}
    assert found(tmp_path, config, {"http_proxy": "mine"})[0] == both


def test_entry_of_the_engine_counts_before_the_default(tmp_path: Path) -> None:
    engine = "unix:///var/run/docker.sock"
    config = {"proxies": {"default": {"httpProxy": "d"}, engine: {"noProxy": "e"}}}
    assert found(tmp_path, config)[0] == {"NO_PROXY": "e"}
    assert found(tmp_path, config, DOCKER_HOST="tcp://x:1")[0] == {"HTTP_PROXY": "d"}


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ('{"proxies": ', "is not valid JSON"),
        ({"proxies": 3}, "cannot be read"),
        ({"proxies": ["default"]}, "cannot be read"),
        ({"proxies": {"default": "http://x"}}, "cannot be read"),
        ({"currentContext": "none", "proxies": {"x": {}}}, 'docker context "none"'),
    ],
)
def test_build_goes_on_without_a_configuration_that_cannot_be_read(
    tmp_path: Path, config: Any, warning: str
) -> None:
    arguments, told = found(tmp_path, config, {"A": "1"})
    assert arguments == {"A": "1"}
    assert warning in told
