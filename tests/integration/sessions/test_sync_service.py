"""Directories of a member in a session: over gRPC, by processes in the engine's namespaces."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from offload_core.errors import InvalidValueError, NotFoundError
from tests.fixtures.syncservice import ID_BASE, Namespaces, SyncServer, names, until

IDS = (1000, 1001)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[SyncServer]:
    with Namespaces() as namespaces:
        async with SyncServer(tmp_path, namespaces, IDS) as server:
            yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


async def test_files_belong_to_the_member_in_the_session(server: SyncServer, project: Path) -> None:
    (project / "src").mkdir()
    (project / "src" / "main.py").write_text("print()")
    (project / "link").symlink_to("src/main.py")
    path = await server.mounts.prepare(str(project), read_only=False)
    there = server.there(path)
    assert (there / "src" / "main.py").read_text() == "print()"
    for name in (".", "src", "src/main.py", "link"):
        status = (there / name).lstat()
        assert (status.st_uid, status.st_gid) == (ID_BASE + 1000, ID_BASE + 1001), name
    assert str((there / "link").readlink()) == "src/main.py"


async def test_what_a_container_writes_is_here_after_its_exit(
    server: SyncServer, project: Path
) -> None:
    path = await server.mounts.prepare(str(project), read_only=False)
    server.namespaces.do(
        f"os.mkdir('{path}/out'); made = Path('{path}/out/result'); made.write_text('42'); "
        f"made.chmod(0o4755); Path('{path}/large').write_bytes(b'0123456789' * 600_000)"
    )
    await server.mounts.after_exit()
    status = (project / "out" / "result").stat()
    assert (project / "out" / "result").read_text() == "42"
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert stat.S_IMODE(status.st_mode) == 0o755
    assert (project / "large").read_bytes() == b"0123456789" * 600_000


async def test_what_a_build_has_sent_does_not_travel_again(
    server: SyncServer, project: Path
) -> None:
    content = os.urandom(1 << 20)
    await server.store.run(server.store.store_sync, [(hashlib.sha256(content).digest(), content)])
    (project / "known").write_bytes(content)
    (project / "new").write_bytes(b"n" * 100)
    path = await server.mounts.prepare(str(project), read_only=False)
    assert (server.there(path) / "known").read_bytes() == content
    assert server.mounts.sent_bytes <= 100
    digest = hashlib.sha256(b"n" * 100).digest()
    assert await server.store.run(server.store.missing_sync, [digest]) == []


async def test_worker_sees_nothing_of_the_node(server: SyncServer, project: Path) -> None:
    secret = project.parent / "secret"
    secret.write_text("of the node")
    (project / "file").write_text("1")
    path = await server.mounts.prepare(str(project), read_only=False)
    there = server.there(path)
    # The container puts links to a directory of the node, and to one of the engine.
    server.namespaces.do(
        f"os.symlink('{secret.parent}', '{path}/escape'); os.symlink('/etc', '{path}/etc')"
    )
    await server.mounts.after_exit()
    assert str((project / "etc").readlink()) == "/etc"
    (project / "etc").unlink()
    (project / "etc").mkdir()
    (project / "etc" / "engine").write_text("changed")
    await server.mounts.before_start()
    assert (there / "etc" / "engine").read_text() == "changed"
    assert server.there("/etc/engine").read_text() == "engine\n"
    assert secret.read_text() == "of the node"


async def test_synchronisation_goes_on_after_a_pause(server: SyncServer, project: Path) -> None:
    (project / "kept").write_text("1")
    (project / "gone").write_text("1")
    path = await server.mounts.prepare(str(project), read_only=False)
    server.paused = True
    await server.desk.end("s1")
    (project / "kept").write_text("22")
    (project / "gone").unlink()
    server.namespaces.do(f"Path('{path}/made').write_text('meanwhile')")
    server.paused = False
    await until(lambda: (project / "made").exists())
    await server.mounts.after_exit()
    assert (server.there(path) / "kept").read_text() == "22"
    assert not (server.there(path) / "gone").exists()
    assert server.warnings == []


async def test_directory_below_another_one_shares_its_copy(
    server: SyncServer, project: Path
) -> None:
    (project / "sub").mkdir()
    path = await server.mounts.prepare(str(project), read_only=True)
    below = await server.mounts.prepare(str(project / "sub"), read_only=False)
    assert below == f"{path}/sub"
    server.namespaces.do(f"Path('{below}/made').write_text('1')")
    await server.mounts.after_exit()
    assert (project / "sub" / "made").read_text() == "1"


async def test_file_alone_keeps_its_inode_in_the_session(server: SyncServer, project: Path) -> None:
    (project / "conf").write_text("1")
    (project / "other").write_text("1")
    path = await server.mounts.prepare(str(project / "conf"), read_only=False)
    there = server.there(path)
    inode = there.stat().st_ino
    assert names(there.parent) == ["conf"]
    replacement = project / "new"
    replacement.write_text("22")
    replacement.rename(project / "conf")
    await server.mounts.before_start()
    assert (there.read_text(), there.stat().st_ino) == ("22", inode)
    server.namespaces.do(f"Path('{path}').write_text('333')")
    await server.mounts.after_exit()
    assert (project / "conf").read_text() == "333"


async def test_full_disk_is_a_warning_and_recovers(tmp_path: Path, project: Path) -> None:
    with Namespaces("2m") as namespaces:
        async with SyncServer(tmp_path, namespaces, IDS) as server:
            (project / "small").write_text("1")
            (project / "large").write_bytes(os.urandom(3 << 20))
            path = await server.mounts.prepare(str(project), read_only=False)
            assert (server.there(path) / "small").read_text() == "1"
            assert names(server.there(path)) == ["small"]
            assert any("disk of the session is full" in text for text in server.warnings)
            (project / "large").write_bytes(b"fits")
            await server.mounts.before_start()
            assert (server.there(path) / "large").read_bytes() == b"fits"
            assert (project / "small").read_text() == "1"


@pytest.mark.parametrize("source", ["/", "/proc/self", "/dev", "/sys"])
async def test_refuses_what_is_no_project(server: SyncServer, source: str) -> None:
    with pytest.raises(InvalidValueError):
        await server.mounts.prepare(source, read_only=True)


async def test_refuses_a_socket_and_what_is_not_there(server: SyncServer, project: Path) -> None:
    os.mkfifo(project / "pipe")
    with pytest.raises(InvalidValueError, match="named pipe"):
        await server.mounts.prepare(str(project / "pipe"), read_only=True)
    with pytest.raises(NotFoundError):
        await server.mounts.prepare(str(project / "nothing"), read_only=True)
