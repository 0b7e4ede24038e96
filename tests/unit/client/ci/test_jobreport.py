"""Where summary and result file go, and what becomes of those that cannot be written."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from offload_client.ci.jobreport import JobReport
from offload_client.connections import Connections
from offload_client.invocation import Invocation
from offload_core.errors import BuildFailedError, ConfigError, NodeLostError

if TYPE_CHECKING:
    from pathlib import Path

METADATA = {
    "containerimage.digest": "sha256:" + "a" * 64, "image.name": "a:1,b:2",
    "buildx.build.ref": "offload/one/b1",
}  # fmt: skip


def invocation(folder: Path, **environment: str) -> Invocation:
    return Invocation((), folder, environment, 0, io.StringIO(), io.StringIO())


async def write(report: JobReport, error: ConfigError | BuildFailedError | NodeLostError | None):
    async with Connections() as connections:
        await report.write(None, connections, error)


async def test_result_file_has_what_there_is(tmp_path: Path) -> None:
    report = JobReport(invocation(tmp_path), "app", "", "ids")
    (tmp_path / "ids").write_text("OFFLOAD_IMAGE_DIGEST=old\n")
    report.prepare()
    assert not (tmp_path / "ids").exists()
    report.built("b1")
    report.built("b1", metadata=METADATA)
    report.image_id("sha256:" + "b" * 64)
    await write(report, None)
    assert (tmp_path / "ids").read_text().splitlines() == [
        "OFFLOAD_BUILD_ID=b1",
        "OFFLOAD_BUILD_REF=offload/one/b1",
        f"OFFLOAD_IMAGE_DIGEST={METADATA['containerimage.digest']}",
        "OFFLOAD_IMAGE_NAME=a:1,b:2",
        f"OFFLOAD_IMAGE_ID=sha256:{'b' * 64}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


async def test_github_summary_is_added_to_and_others_are_replaced(tmp_path: Path) -> None:
    variables = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "step")}
    for name in ("one", "two"):
        await write(JobReport(invocation(tmp_path, **variables), name, ""), None)
        await write(JobReport(invocation(tmp_path, **variables), name, "own"), None)
    assert (tmp_path / "step").read_text().count(": built") == 2
    assert (tmp_path / "own").read_text() == "### two: built\n\n"
    await write(JobReport(invocation(tmp_path, **variables), "three", "none"), None)
    elsewhere = {"GITHUB_STEP_SUMMARY": str(tmp_path / "other")}
    await write(JobReport(invocation(tmp_path, **elsewhere), "four", ""), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "step"]


async def test_summary_of_github_never_fails_a_build(tmp_path: Path) -> None:
    variables = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "no" / "step")}
    here = invocation(tmp_path, **variables)
    report = JobReport(here, "app", "")
    report.prepare()
    await write(report, None)
    assert "WARNING: cannot write" in here.stderr.getvalue()  # type: ignore[attr-defined]
    (tmp_path / "full").write_bytes(b"x" * (1 << 20))
    here = invocation(tmp_path, **variables | {"GITHUB_STEP_SUMMARY": str(tmp_path / "full")})
    await write(JobReport(here, "app", ""), None)
    assert "no room" in here.stderr.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "full").stat().st_size == 1 << 20


async def test_summary_that_was_asked_for_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        JobReport(invocation(tmp_path), "app", "no/summary.md").prepare()
    report = JobReport(invocation(tmp_path), "app", "gone/summary.md")
    (tmp_path / "gone").mkdir()
    report.prepare()
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError):
        await write(report, None)
    here = invocation(tmp_path)
    await write(JobReport(here, "app", "gone/summary.md"), BuildFailedError("no"))
    assert "WARNING: cannot write" in here.stderr.getvalue()  # type: ignore[attr-defined]


async def test_fault_without_a_build_is_explained(tmp_path: Path) -> None:
    error = NodeLostError("the node <x> was lost", hint="run it again")
    await write(JobReport(invocation(tmp_path), "app", "summary.md"), error)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("### app: failed\n")
    assert "ERROR: the node &lt;x&gt; was lost\nrun it again\n</pre>" in text
