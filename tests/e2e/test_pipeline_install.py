"""Pipelines without the client install it before they build."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.fixtures.pipelines import GithubJob, run_script

ROOT = Path(__file__).resolve().parents[2]
SITE = next(path for path in map(Path, sys.path) if path.name == "site-packages")
NAME = "offload_build-0.1.0"
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: offload-build\nVersion: 0.1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[console_scripts]\n"
    "offload-build = offload_client.cli.entry:build_main\n"
    "offload = offload_client.cli.entry:offload_main\n",
}


def wheel(folder: Path) -> Path:
    """Return a wheel with the client; what it needs comes from where the tests run."""
    path = folder / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for source in ("client/offload_client", "proto/offload_core", "proto/offload_proto"):
            for file in sorted((ROOT / source).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    archive.write(file, file.relative_to((ROOT / source).parent))
        for name, text in METADATA.items():
            archive.writestr(f"{NAME}.dist-info/{name}", text)
        lines = "".join(f"{name},,\n" for name in archive.namelist())
        archive.writestr(f"{NAME}.dist-info/RECORD", f"{lines}{NAME}.dist-info/RECORD,,\n")
    return path


def bare_environment(folder: Path) -> dict[str, str]:
    """Return an environment whose PATH has Python and no client."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    (folder / "home").mkdir()
    return {
        "HOME": str(folder / "home"), "PATH": f"{tools}:/usr/bin:/bin", "OFFLOAD_RESIDENT": "0",
        "PYTHONPATH": str(SITE), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OFFLOAD_PACKAGE": str(wheel(folder)),
    }  # fmt: skip


def test_action_and_script_install_the_client(tmp_path: Path) -> None:
    environment = bare_environment(tmp_path)
    found = subprocess.run(
        ["which", "offload-build"], env=environment, capture_output=True, check=False
    )
    assert found.returncode == 1
    job = GithubJob(ROOT, tmp_path / "runner", environment)
    package = environment["OFFLOAD_PACKAGE"]
    ended = job.run_action(
        "deploy/ci/github/setup", gateway="127.0.0.1:1", token="x", package=package
    )
    assert "this is not a token of an offload gateway" in ended.log
    assert ended.returncode == 4
    assert job.environment["PATH"].startswith(str(tmp_path / "runner"))

    script = ROOT / "deploy" / "ci" / "generic" / "offload-build.sh"
    work = tmp_path / "work"
    work.mkdir()
    done = run_script(f"{script} --version", environment, work)
    assert done.stdout == "offload-build, version 0.1.0\n"
