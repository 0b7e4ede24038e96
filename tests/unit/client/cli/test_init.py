"""`offload init` writes what is missing, and nothing over what is there."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from offload_client.ci.scaffold import TEMPLATES, template_text
from offload_client.cli.offload import offload
from offload_client.invocation import Invocation
from offload_client.settings import pinned_ca, resolve_settings
from offload_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
CA = "a1" * 32
GIVEN = ("--gateway", "gateway.test:7000", "--ca", CA, "--project", "shop")


def run(folder: Path, *arguments: str) -> str:
    """Run in a folder; return what was printed."""
    out = io.StringIO()
    invocation = Invocation(arguments, folder, {"HOME": str(folder / "home")}, 0, out, out)
    words = ["init", *arguments]
    assert offload.main(words, "offload", standalone_mode=False, obj=invocation) == 0
    return out.getvalue()


def test_project_file_is_what_other_commands_read(tmp_path: Path) -> None:
    assert run(tmp_path, *GIVEN) == "Wrote     offload.toml\n"
    (tmp_path / "app").mkdir()
    there = Invocation((), tmp_path / "app", {"HOME": "/nowhere"}, 0, io.StringIO(), io.StringIO())
    settings = resolve_settings(there)
    assert (settings.gateway, settings.project) == ("gateway.test:7000", "shop")
    assert pinned_ca(there, settings.gateway) == CA


@pytest.mark.parametrize("system", TEMPLATES)
def test_files_of_each_system_name_the_gateway(tmp_path: Path, system: str) -> None:
    said = run(tmp_path, *GIVEN, "--ci", system)
    for template in TEMPLATES[system]:
        path = tmp_path / template.path
        assert f"Wrote     {template.path}\n" in said
        text = path.read_text()
        assert text.count("gateway.example:7443") == 0 if template.example else True
        assert bool(path.stat().st_mode & 0o111) is template.program
        assert template_text(template) == (ROOT / "deploy/ci" / template.source).read_text()
    examples = [tmp_path / item.path for item in TEMPLATES[system] if item.example]
    for path in examples:
        if system != "circleci" or path.name == "config.yml":
            assert "https://gateway.test:7000" in path.read_text()
            assert CA in path.read_text()


def test_nothing_is_written_over_another_file_without_force(tmp_path: Path) -> None:
    run(tmp_path, *GIVEN)
    path = tmp_path / ".gitlab" / "offload-build.yml"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"nothing was written: .gitlab/offload-build.yml is"):
        run(tmp_path, "--ci", "gitlab")
    assert not (tmp_path / ".gitlab-ci.yml").exists()
    with pytest.raises(ConfigError, match=r"offload\.toml is there"):
        run(tmp_path, "--gateway", "other.test", "--ci", "github")
    assert not (tmp_path / ".github").exists()
    said = run(tmp_path, "--ci", "gitlab", "--force")
    assert "Replaced  .gitlab/offload-build.yml\n" in said
    assert path.read_text() != "mine"
    assert not list(tmp_path.rglob(".*.new"))


def test_pipeline_that_is_there_stays_and_what_belongs_into_it_is_shown(tmp_path: Path) -> None:
    (tmp_path / ".gitlab-ci.yml").write_text("mine")
    said = run(tmp_path, *GIVEN, "--ci", "gitlab")
    assert "Wrote     .gitlab/offload-build.yml\n" in said
    assert "Kept      .gitlab-ci.yml; take over what you need of this:\n\nstages:" in said
    assert f"ca: {CA}" in said
    assert "Next:" not in said
    assert (tmp_path / ".gitlab-ci.yml").read_text() == "mine"


def test_project_file_stays_and_is_used_for_a_pipeline(tmp_path: Path) -> None:
    run(tmp_path, *GIVEN)
    before = (tmp_path / "offload.toml").read_text()
    said = run(tmp_path, "--ci", "jenkins")
    assert "Kept      offload.toml" in said
    assert "Next: put the name of your image into Jenkinsfile." in said
    assert CA in (tmp_path / "Jenkinsfile").read_text()
    assert (tmp_path / "offload.toml").read_text() == before
    assert "Unchanged Jenkinsfile" in run(tmp_path, "--ci", "jenkins")


def test_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("x")
    (tmp_path / "offload.toml").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError):
        run(tmp_path, *GIVEN)
    run(tmp_path, *GIVEN, "--force")
    assert (tmp_path / "victim").read_text() == "x"
    assert not (tmp_path / "offload.toml").is_symlink()


def test_without_a_gateway_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no gateway is configured"):
        run(tmp_path)
    said = run(tmp_path, "--gateway", "gateway.test")
    assert "fingerprint of the gateway's CA is not known" in said
    assert (tmp_path / "offload.toml").read_text() == (
        'gateway = "https://gateway.test:7443"\nproject = "default"\n'
    )
