"""The files that a repository needs to build in a pipeline.

The files below `files/` are those of deploy/ci; `python deploy/generate_docs.py` copies them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_GATEWAY = "https://gateway.example:7443"
_CA = "FINGERPRINT"


@dataclass(frozen=True)
class Template:
    """One file.

    Attributes:
        source: path below deploy/ci.
        path: where it belongs in a repository.
        program: it can be run.
        example: people change it; it names an image and a place of the gateway.
    """

    source: str
    path: str
    program: bool = False
    example: bool = False


_STEP = Template("generic/offload-build.sh", "ci/offload-build.sh", program=True)
TEMPLATES: dict[str, tuple[Template, ...]] = {
    "github": (
        Template("github/setup/action.yml", ".github/actions/offload-setup/action.yml"),
        Template("github/build/action.yml", ".github/actions/offload-build/action.yml"),
        Template("github/workflow.yml", ".github/workflows/image.yml", example=True),
    ),
    "gitlab": (
        Template("gitlab/offload-build.yml", ".gitlab/offload-build.yml"),
        Template("gitlab/gitlab-ci.yml", ".gitlab-ci.yml", example=True),
    ),
    "buildkite": (
        Template("buildkite/plugin.yml", ".buildkite/plugins/offload/plugin.yml"),
        Template(
            "buildkite/hooks/command", ".buildkite/plugins/offload/hooks/command", program=True
        ),
        Template("buildkite/pipeline.yml", ".buildkite/pipeline.yml", example=True),
    ),
    "circleci": (_STEP, Template("circleci/config.yml", ".circleci/config.yml", example=True)),
    "jenkins": (Template("jenkins/Jenkinsfile", "Jenkinsfile", example=True),),
    "generic": (_STEP,),
}


@dataclass(frozen=True)
class PlannedFile:
    """A file that is to be written.

    Attributes:
        path: where.
        text: its content.
        program: it can be run.
        example: people change it.
    """

    path: Path
    text: str
    program: bool = False
    example: bool = False

    def differs(self) -> bool:
        """Return whether something else is there already.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return os.path.lexists(self.path) and not (
                self.path.is_file() and self.path.read_bytes() == self.text.encode()
            )
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error

    def write(self) -> None:
        """Write it; what is there is replaced, a link too.

        Raises:
            ConfigError: it cannot be written.
        """
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(self.text.encode())
            scratch.chmod(0o755 if self.program else 0o644)
            scratch.replace(self.path)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            scratch.unlink(missing_ok=True)


def template_text(template: Template) -> str:
    """Return the text of a template as deploy/ci has it."""
    return files("offload_client.ci").joinpath("files", template.source).read_text("utf-8")


def plan(system: str, top: Path, *, gateway: str, ca: str) -> Sequence[PlannedFile]:
    """Return the files for a system, with the gateway in the place of the example's.

    Args:
        system: a key of `TEMPLATES`.
        top: directory of the repository.
        gateway: URL.
        ca: fingerprint; empty where it is not known.
    """
    planned = []
    for template in TEMPLATES[system]:
        text = template_text(template)
        if template.example:
            text = text.replace(_GATEWAY, gateway).replace(_CA, ca or _CA)
        planned.append(
            PlannedFile(top / template.path, text, template.program, example=template.example)
        )
    return planned
