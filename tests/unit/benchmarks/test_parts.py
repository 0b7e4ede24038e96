from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

from cryptography import x509

from benchmarks.buildkitport import open_port
from benchmarks.rss import PeakMemory, resident_bytes
from benchmarks.settle import children, descendants
from offload_builder.buildkit.daemon_config import DaemonSettings, daemon_toml


def test_script_starts_buildkit_with_the_nodes_socket_and_the_port(tmp_path: Path) -> None:
    socket = tmp_path / "run" / "bk.sock"
    config = tmp_path / "buildkitd.toml"
    config.write_text(daemon_toml(DaemonSettings(root=tmp_path), socket, Path("/bin/true")))
    port = open_port(tmp_path / "port", "10.0.0.2", 1234, buildkitd=Path("/bin/echo"))
    assert port.address == "tcp://10.0.0.2:1234"
    done = subprocess.run(
        [port.script, f"--config={config}", "--root=/r"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        f"--config={config} --root=/r --addr unix://{socket} --addr tcp://10.0.0.2:1234 --tlscacert"
    )


def test_certificate_of_the_port_is_for_its_address(tmp_path: Path) -> None:
    port = open_port(tmp_path / "port", "10.0.0.2", 1234)
    authority, server = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (port.client.ca, tmp_path / "port" / "server.pem")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.2"]
    assert (port.client.key.stat().st_mode & 0o777) == 0o600
    assert str(port.client.key) in port.client.driver_options
    assert f"--tlskey={port.client.key}" in port.client.flags


def test_peak_is_seen_after_the_memory_was_given_back() -> None:
    before = resident_bytes([os.getpid()])
    # Memory of its own, not from what this process has freed before.
    with PeakMemory(lambda: [os.getpid()]) as peak, mmap.mmap(-1, 64 << 20) as block:
        block.write(os.urandom(1 << 20) * 64)
        subprocess.run(["sleep", "0.1"], check=True)
        block.close()
    assert peak.peak_bytes - before > 50_000_000


def test_process_that_is_gone_takes_no_memory() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert resident_bytes([process.pid]) == 0


def test_descendants_leave_a_program_out_with_its_children() -> None:
    with subprocess.Popen(
        ["sh", "-c", "echo; sleep 60 & wait"], stdout=subprocess.PIPE, start_new_session=True
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        while not (sleepers := children(shell.pid)):
            pass
        try:
            assert shell.pid in children(os.getpid())
            assert descendants(shell.pid) == [shell.pid, *sleepers]
            assert descendants(shell.pid, without=("sh",)) == []
        finally:
            os.killpg(shell.pid, 15)
