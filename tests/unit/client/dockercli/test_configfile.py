"""Docker's config.json, changed and changed back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from offload_client.dockercli.configfile import DockerConfigFile
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FORMS = [
    '{\n\t"auths": {},\n\t"b": [\n\t\t1\n\t]\n}',
    '{\n  "z": "ü <&>",\n  "aliases": {},\n  "a": null\n}\n',
    '{"auths":{"x":{}},"aliases":{"y":"z"}}',
    "{}",
]


@pytest.mark.parametrize("text", FORMS)
def test_change_and_back_leaves_the_same_bytes(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    path.chmod(0o644)
    config = DockerConfigFile(path)
    had_aliases = config.has_aliases
    config.set_builder("offload")
    config.save()
    changed = DockerConfigFile(path)
    assert changed.builder == "offload"
    assert {key for key in changed.content if key != "aliases"} == {
        key for key in json.loads(text) if key != "aliases"
    }
    changed.drop_builder(keep_aliases=had_aliases)
    changed.save()
    assert path.read_text() == text
    assert path.stat().st_mode & 0o777 == 0o644
    assert [item.name for item in tmp_path.iterdir()] == ["config.json"]


def test_link_stays_a_link_and_new_file_is_private(tmp_path: Path):
    (tmp_path / "real.json").write_text("{}")
    link = tmp_path / "config.json"
    link.symlink_to("real.json")
    config = DockerConfigFile(link)
    config.set_builder("offload")
    config.save()
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"aliases": {"builder": "offload"}}
    new = DockerConfigFile(tmp_path / "sub" / "config.json")
    new.set_builder("offload")
    new.save()
    assert new.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["[]", '{"aliases": 1}', '{"auths": {"secret"'])
def test_file_of_another_form_is_left_alone_and_not_shown(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        DockerConfigFile(path)
    assert "secret" not in str(caught.value)
    assert path.read_text() == text
