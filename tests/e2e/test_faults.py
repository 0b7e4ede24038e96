"""Bad input and faults: a clear sentence, a documented exit code, nothing lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fixtures.contexts import make_context
from tests.fixtures.minio import MinioServer
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from tests.fixtures.pool import Member


def assert_sentence(result: subprocess.CompletedProcess[str], code: int, *expected: str) -> None:
    """Check exit code and sentence, and that no traceback is shown."""
    assert result.returncode == code, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1, result.stderr
    for text in expected:
        assert text in result.stderr, result.stderr


def test_no_gateway_configured(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    context = make_context(tmp_path / "c")
    result = member.run("offload-build", context, OFFLOAD_CONFIG_DIR=str(tmp_path / "none"))
    assert_sentence(result, 3, "no gateway is configured", "offload login")


def test_gateway_down(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    # The login is for the other gateway; a copy of it stands for a gateway that went down.
    folder = member.home / ".config/offload/gateways"
    source = next(folder.iterdir())
    (folder / f"127.0.0.1_{port}").mkdir()
    (folder / f"127.0.0.1_{port}" / "identity").write_bytes((source / "identity").read_bytes())
    began = time.monotonic()
    result = member.build("--gateway", f"https://127.0.0.1:{port}", context)
    assert_sentence(result, 7, f"the gateway at 127.0.0.1:{port} does not answer")
    assert time.monotonic() - began < 30


def test_wrong_token(pool: Pool, member: Member) -> None:
    parts = pool.admin_token.split("_")
    parts[2] = parts[2][::-1]
    result = member.offload("login", f"https://{pool.address}", "--token", "_".join(parts))
    assert_sentence(result, 4, "token")
    result = member.offload("login", f"https://{pool.address}", "--token", "nonsense")
    assert_sentence(result, 4, "not a token of an offload gateway")


def test_token_of_another_gateway(pool: Pool, member: Member) -> None:
    parts = pool.admin_token.split("_")
    parts[-1] = "0" * 32
    result = member.offload("login", f"https://{pool.address}", "--token", "_".join(parts))
    assert_sentence(result, 4, "not the one that this token was made for")


def test_expired_token(pool: Pool, tmp_path: Path) -> None:
    token = pool.create_token("brief", "member", "--expires-in", "8s")
    ended_at = time.monotonic() + 8.5
    member = pool.member(token)
    time.sleep(max(0.0, ended_at - time.monotonic()))
    assert_sentence(member.build(make_context(tmp_path / "c")), 4, "expired")
    again = member.offload("login", f"https://{pool.address}", "--token", token)
    assert_sentence(again, 4, "expired")


def test_unknown_project(member: Member, tmp_path: Path) -> None:
    result = member.build("--project", "nowhere", make_context(tmp_path / "c"))
    assert_sentence(result, 5, "nowhere")


def test_missing_dockerfile(member: Member, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = member.build(tmp_path / "empty")
    assert_sentence(result, 1, "failed to read dockerfile", "no such file")
    result = member.build("-f", "nope/Dockerfile.dev", make_context(tmp_path / "c"))
    assert_sentence(result, 1, "failed to read dockerfile", "Dockerfile.dev")


def test_missing_context_directory(member: Member, tmp_path: Path) -> None:
    assert_sentence(member.build(tmp_path / "nowhere"), 1, "unable to prepare context", "nowhere")


def test_dockerfile_syntax_error_shows_the_line(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUNN echo x\n")
    result = member.build(context)
    assert_sentence(result, 1, "unknown instruction: RUNN")
    assert re.search(r"^Dockerfile:4$", result.stderr, re.MULTILINE)
    assert re.search(r"^ +4 \| >>> RUNN echo x$", result.stderr, re.MULTILINE)


def test_failing_run_shows_its_output_and_exit_code(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo the-cause >&2; exit 37\n")
    result = member.build(context)
    assert_sentence(result, 1, "the-cause", "exit code: 37", "Dockerfile:4")
    newest = member.wait_state("failed")
    assert "exit code: 37" in newest["error"]


def test_unreadable_file_names_path_and_reason(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "COPY . /all\n", secret="x")
    (context / "secret").chmod(0o000)
    # Root can read everything; without these capabilities it is a user like any other.
    result = subprocess.run(
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
         *member.command("offload-build", "--progress", "plain", context)],
        capture_output=True, text=True, env=member.environment, cwd=member.home, timeout=60,
    )  # fmt: skip
    assert_sentence(result, 1, "secret", "ermission denied")


def test_sockets_fifos_and_dangling_links_do_not_stop_a_build(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(
        tmp_path / "c", "COPY . /all\nRUN readlink /all/dangling && test -p /all/pipe\n"
    )
    os.mkfifo(context / "pipe")
    (context / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(context)
        listener.bind("sock")
        result = member.build(context)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^#\d+ \d+\.\d+ nowhere$", result.stderr, re.MULTILINE)


def test_file_that_changes_while_it_is_read_is_told_and_never_stored(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "COPY big /big\n")
    big = context / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    stop = threading.Event()

    def change() -> None:
        with big.open("r+b") as file:
            while not stop.is_set():
                for offset in range(0, 1 << 30, 64 << 20):
                    file.seek(offset)
                    file.write(os.urandom(8))
                file.flush()

    changer = threading.Thread(target=change)
    changer.start()
    try:
        result = member.build(context)
    finally:
        stop.set()
        changer.join()
    assert_sentence(result, 10, "changed during the build", '"big"')


def test_name_that_is_not_utf8_is_refused_by_name_unless_ignored(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "COPY . /all\n")
    (Path(os.fsdecode(os.fsencode(context) + b"/caf\xe9"))).write_text("x")
    assert_sentence(member.build(context), 1, "caf", "UTF-8")
    (context / ".dockerignore").write_text("caf*\n")
    result = member.build(context)
    assert result.returncode == 0, result.stderr


def test_unknown_flag_is_refused_by_name(member: Member, tmp_path: Path) -> None:
    result = member.build("--squash-everything", make_context(tmp_path / "c"))
    assert_sentence(result, 125, "unknown flag: --squash-everything")
    assert_sentence(member.run("offload-build"), 1, "requires 1 argument")


def test_buildkitd_killed_in_the_middle_fails_the_build_with_the_cause(
    pool: Pool, member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN echo begun && sleep 600\n")
    building = member.start(context)
    wait_for_text(building, "begun")
    newest = member.builds()[0]
    os.kill(pool.buildkitd_pid(newest["node_id"]), signal.SIGKILL)
    _, errors = building.communicate(timeout=60)
    assert building.returncode == 7, errors
    assert "buildkitd was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    member.wait_state("failed")
    # The node starts another one for the next build.
    result = member.build(make_context(tmp_path / "next", "RUN echo alive\n"))
    assert result.returncode == 0, result.stderr


def test_node_killed_is_heard_by_client_and_gateway(tmp_path: Path) -> None:
    with Pool(1) as pool:
        member = pool.member(OFFLOAD_REPEATS="0")
        context = make_context(tmp_path / "c", "RUN echo begun && sleep 600\n")
        building = member.start(context)
        wait_for_text(building, "begun")
        os.kill(pool.node_pid("node-1"), signal.SIGKILL)
        _, errors = building.communicate(timeout=30)
        assert building.returncode == 7, errors
        assert "Traceback" not in errors
        assert re.search(r"^ERROR: .*node", errors, re.MULTILINE)
        assert "again" in errors
        member.wait_state("lost", timeout=30)
        # `up` starts the node again, and its BuildKit left nothing behind that stands in the way.
        result = member.build(make_context(tmp_path / "next", "RUN echo alive\n"))
        assert result.returncode == 0, result.stderr


def test_s3_down_is_a_warning_and_the_build_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "minio"
    root.mkdir()
    with MinioServer(root) as minio:
        keys = {
            "AWS_ACCESS_KEY_ID": minio.access_key,
            "AWS_SECRET_ACCESS_KEY": minio.secret_key,
        }
        with Pool(1, "--s3", f"{minio.endpoint_url}/bucket", environment=keys) as pool:
            member = pool.member()
            first = member.build("-t", "one", make_context(tmp_path / "a", "RUN echo a\n"))
            assert first.returncode == 0, first.stderr
            minio.stop()
            for number in range(4):
                steps = f"RUN echo number-{number}\n"
                result = member.build("-t", "two", make_context(tmp_path / f"b{number}", steps))
                assert result.returncode == 0, result.stderr
                if "shared cache" in result.stderr and "not reachable" in result.stderr:
                    break
                time.sleep(1)
            else:
                raise AssertionError(f"no warning about the shared cache:\n{result.stderr}")


def test_full_disk_at_the_node_is_one_sentence(tmp_path: Path) -> None:
    mount = Path(tempfile.mkdtemp(prefix="ofull-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", mount], check=True)
    try:
        with Pool(1, data=mount) as pool:
            member = pool.member()
            context = make_context(tmp_path / "c", "COPY big /big\n")
            (context / "big").write_bytes(os.urandom(160 << 20))
            result = member.build(context)
            assert result.returncode in (1, 6), result.stderr
            assert "Traceback" not in result.stderr
            assert re.search(r"disk|no space left", result.stderr), result.stderr
            small = member.build(make_context(tmp_path / "s", "RUN echo small\n"))
            assert small.returncode == 0, small.stderr
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
        mount.rmdir()
