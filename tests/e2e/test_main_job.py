"""The main job: one command builds on a remote node and brings the image back."""

from __future__ import annotations

import json
import re
import signal
import tarfile
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

STEPS = "RUN echo one > /one\nRUN cat /one && echo two > /two\n"


def test_build_streams_buildkit_steps_as_plain_text(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo marker-$((6*7))\n")
    result = member.build(context)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^#\d+ \[\d/\d\] RUN echo marker", result.stderr, re.MULTILINE)
    assert re.search(r"^#\d+ \d+\.\d+ marker-42$", result.stderr, re.MULTILINE)
    assert re.search(r"^#\d+ DONE \d+\.\ds$", result.stderr, re.MULTILINE)
    assert "No output specified" in result.stderr
    assert result.stdout == ""


def test_second_build_of_the_same_tree_is_cached_and_sends_nothing(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", STEPS)
    assert member.build(context).returncode == 0
    # A fresh checkout: other directory, other times.
    again = make_context(tmp_path / "other-name", STEPS)
    result = member.build(again)
    assert result.returncode == 0, result.stderr
    newest = member.wait_state("succeeded")
    assert newest["stats"]["steps_cached"] == newest["stats"]["steps_total"] > 0
    assert newest["stats"]["context_sent_bytes"] == 0


def test_changed_content_with_same_size_and_time_is_not_served_stale(
    member: Member, tmp_path: Path
) -> None:
    import os

    context = make_context(tmp_path / "c", "COPY data /data\nRUN cat /data\n", data="first")
    moment = (1_600_000_000, 1_600_000_000)
    os.utime(context / "data", moment)
    assert "first" in member.build(context).stderr
    (context / "data").write_text("other")
    os.utime(context / "data", moment)
    result = member.build(context)
    assert re.search(r"^#\d+ \d+\.\d+ other$", result.stderr, re.MULTILINE), result.stderr


@pytest.fixture
def narrow_pool() -> Iterator[Pool]:
    """Two nodes with one slot each: while one is busy, the other gets the next build."""
    with Pool(2, "--minio", "--slots", "1") as running:
        yield running


def test_second_member_on_an_empty_node_gets_every_step_from_the_cache(
    narrow_pool: Pool, tmp_path: Path
) -> None:
    context = make_context(
        tmp_path / "c", STEPS + "COPY big /big\nRUN sha256sum /big\n", big="x" * 3_000_000
    )
    first, second = narrow_pool.member(), narrow_pool.member()
    result = first.build("-t", "app", "--metadata-file", tmp_path / "first.json", context)
    assert result.returncode == 0, result.stderr
    used = first.wait_published()["node_id"]
    busy = make_context(tmp_path / "busy", "RUN sleep 100\n")
    holding = first.start(busy)
    try:
        wait_for_text(holding, "RUN sleep 100")
        result = second.build("-t", "app", "--metadata-file", tmp_path / "second.json", context)
    finally:
        holding.send_signal(signal.SIGINT)
        holding.communicate(timeout=30)
    assert result.returncode == 0, result.stderr
    newest = second.wait_state("succeeded")
    assert newest["node_id"] != used
    assert newest["stats"]["steps_total"] == newest["stats"]["steps_cached"] > 0
    digests = [
        json.loads((tmp_path / name).read_text())["containerimage.digest"]
        for name in ("first.json", "second.json")
    ]
    assert digests[0] == digests[1]


def test_ctrl_c_cancels_the_build_at_the_node_within_two_seconds(
    pool: Pool, member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN echo begun && sleep 4242\n")
    building = member.start(context)
    wait_for_text(building, "begun")
    began = time.monotonic()
    building.send_signal(signal.SIGINT)
    _, errors = building.communicate(timeout=20)
    while _running("4242"):
        assert time.monotonic() - began < 2.0, "the RUN step still runs"
        time.sleep(0.02)
    assert time.monotonic() - began < 2.0
    assert building.returncode == 130
    assert "Traceback" not in errors
    member.wait_state("canceled")


def _running(needle: str) -> bool:
    from pathlib import Path

    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if needle.encode() in words and b"sleep" in words:
            return True
    return False


def test_oci_docker_tar_and_local_outputs(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo content > /file\n")
    result = member.build(
        "-t", "app:1",
        "-o", f"type=oci,dest={tmp_path}/oci.tar",
        "-o", f"type=docker,dest={tmp_path}/docker.tar",
        "-o", f"type=tar,dest={tmp_path}/files.tar",
        "-o", str(tmp_path / "files"),
        context,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "oci.tar") as archive:
        assert "index.json" in archive.getnames()
    with tarfile.open(tmp_path / "docker.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert manifest[0]["RepoTags"] == ["app:1"]
    with tarfile.open(tmp_path / "files.tar") as files:
        assert files.extractfile("file").read() == b"content\n"  # type: ignore[union-attr]
    assert (tmp_path / "files" / "file").read_text() == "content\n"
    assert (tmp_path / "files" / "bin" / "sh").is_symlink() or (tmp_path / "files/bin/sh").exists()


def test_output_to_standard_output_is_a_tar_archive(member: Member, tmp_path: Path) -> None:
    import io
    import subprocess

    context = make_context(tmp_path / "c", "RUN echo content > /file\n")
    done = subprocess.run(
        member.command("offload-build", "--progress", "plain", "-o", "-", context),
        capture_output=True, env=member.environment, cwd=member.home, timeout=60, check=True,
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        assert files.extractfile("file").read() == b"content\n"  # type: ignore[union-attr]


def test_quiet_prints_only_the_image_id_and_iidfile_holds_it(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN echo quiet > /quiet\n")
    result = member.run("offload-build", "-q", "--iidfile", tmp_path / "iid", context)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", result.stdout)
    assert (tmp_path / "iid").read_text() == result.stdout.strip()
    assert result.stderr == ""


def test_target_build_args_labels_and_no_cache_reach_the_build(
    member: Member, tmp_path: Path
) -> None:
    context = tmp_path / "c"
    make_context(context)
    (context / "Dockerfile").write_text(
        (context / "Dockerfile").read_text().replace("FROM scratch", "FROM scratch AS tools")
        + "ARG NAME\nRUN echo built-for-$NAME\n"
        "FROM tools AS other\nRUN echo never-built && false\n"
    )
    options = ("--target", "tools", "--build-arg", "NAME=her", "--label", "team=one")
    result = member.build(*options, "-o", f"type=oci,dest={tmp_path}/i.tar", context)
    assert result.returncode == 0, result.stderr
    assert "built-for-her" in result.stderr
    assert "never-built" not in result.stderr
    assert b"team" in (tmp_path / "i.tar").read_bytes()
    assert "built-for-her" not in _step_output(member.build(*options, context).stderr)
    assert "built-for-her" in _step_output(member.build(*options, "--no-cache", context).stderr)


def _step_output(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if re.match(r"#\d+ \d+\.\d+ ", line))


def test_history_keeps_the_whole_log(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN seq 1 3000 && echo kept-$((40+2))\n")
    result = member.build("-t", "history-test", context)
    assert result.returncode == 0, result.stderr
    newest = member.wait_state("succeeded")
    assert newest["name"] == "history-test:latest"
    logs = member.offload("logs", newest["build_id"][:6])
    assert logs.returncode == 0, logs.stderr
    kept = [line.split()[-1] for line in logs.stdout.splitlines() if re.match(r"#\d+ \d", line)]
    assert [str(number) for number in range(1, 3001)] == [word for word in kept if word.isdigit()]
    assert "kept-42" in logs.stdout


def test_capabilities_of_the_registry_reach_no_log(
    pool: Pool, member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN echo secretive\n")
    result = member.build("-t", "app", context)
    assert result.returncode == 0, result.stderr
    logs = member.offload("logs", member.wait_state("succeeded")["build_id"]).stdout
    for text in (result.stderr, logs):
        assert not re.search(r"127\.0\.0\.1:\d+/[0-9a-f]{32}", text)
        assert "pool's registry" in text or "shared cache" in text
