"""Every form of build context through a whole pool gives what stock buildx gives for it."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.clientsources import Buildx, in_tar
from tests.fixtures.helper import HelperUser
from tests.fixtures.ociimages import busybox_layer, layer
from tests.fixtures.remotefiles import OciLayout, git_repository, web_server
from tests.fixtures.tarballs import archive, file, hard_link, link
from tests.fixtures.trees import noise, write_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member, Pool

COPY_ALL = "FROM scratch\nCOPY . /\n"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildx]:
    """buildx with a BuildKit of its own."""
    with Buildkitd(tmp_path_factory.mktemp("stock")) as daemon:
        yield Buildx(tmp_path_factory.mktemp("home"), daemon.socket_path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return write_files(
        tmp_path / "work",
        {
            "ctx/Dockerfile": COPY_ALL,
            "ctx/f": "of the context",
            "named/Dockerfile": "FROM scratch\nCOPY --from=extra . /\n",
            "more/kept": "1",
            "more/ignored": "2",
            "more/.dockerignore": "ign*\n",
        },
    )


def run(
    member: Member, work: Path, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run `offload-build` with something on standard input."""
    return subprocess.run(
        member.command("offload-build", "--progress", "plain", *arguments), input=stdin,
        capture_output=True, cwd=work, env=member.environment, timeout=110, check=False,
    )  # fmt: skip


def built(member: Member, work: Path, *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    """Return what a build has in its result."""
    target = work / "ours.tar"
    done = run(member, work, "-o", f"type=tar,dest={target}", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return in_tar(target.read_bytes())


class Same:
    """Builds with both commands; the results must be alike."""

    def __init__(self, member: Member, stock: Buildx, work: Path) -> None:
        self.member, self.stock, self.work = member, stock, work

    async def __call__(self, *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
        found = built(self.member, self.work, *arguments, stdin=stdin)
        assert found == await self.stock.build(self.work, *arguments, stdin=stdin)
        return found


@pytest.fixture
def same(member: Member, stock: Buildx, work: Path) -> Same:
    return Same(member, stock, work)


MEMBERS = [
    file("./Dockerfile", COPY_ALL), file(".dockerignore", "ign*\n"), file("ignored", "x"),
    file("made/up/f", "1"), file("exe", "#!", mode=0o755), link("out", "../../etc"),
    file("z/data", "same"), hard_link("a", "z/data"), file("twice", "1"), file("twice", "2"),
]  # fmt: skip


async def test_archive_on_standard_input(same: Same) -> None:
    found = await same("-", stdin=gzip.compress(archive(*MEMBERS)))
    assert found["ignored"][3] == b"x"
    assert found["twice"][3] == b"2"


def test_archive_sends_what_a_directory_has_not_sent_before(member: Member, work: Path) -> None:
    data = noise("archive", 6_000_000)
    write_files(work, {"big/Dockerfile": "FROM scratch\nCOPY data small /\n", "big/small": "s"})
    write_files(work, {"big/data": data})
    built(member, work, "big")
    members = [file(name, (work / "big" / name).read_bytes())
               for name in ("small", "data", "Dockerfile")]  # fmt: skip
    found = built(member, work, "-", stdin=archive(*members))
    assert found["data"][3] == data
    stats = member.wait_state("succeeded")["stats"]
    assert stats["context_sent_bytes"] == 0


async def test_dockerfile_on_standard_input(same: Same, member: Member, work: Path) -> None:
    assert set(await same("-", stdin=b"FROM scratch\nWORKDIR /w\n")) == {"w"}
    found = await same("-f", "-", "ctx", stdin=b"FROM scratch\nCOPY f /g\n")
    assert found["g"][3] == b"of the context"
    nothing = run(member, work, "-", stdin=b"FROM scratch\nCOPY f /g\n")
    assert nothing.returncode == 1
    assert b'"/f": not found' in nothing.stderr


def test_standard_input_reaches_the_resident_helper(member: Member, work: Path) -> None:
    with HelperUser(member) as user:
        run(member, work, "ctx")
        pid = user.wait()
        assert "ignored" in built(member, work, "-", stdin=archive(*MEMBERS))
        found = built(member, work, "-f", "-", "ctx", stdin=b"FROM scratch\nCOPY f /g\n")
        assert set(found) == {"g"}
        assert user.pids() == [pid]


@pytest.mark.parametrize("resident", [False, True])
def test_ctrl_c_while_standard_input_is_read(member: Member, work: Path, resident: bool) -> None:
    with HelperUser(member) as user:
        member.environment["OFFLOAD_RESIDENT"] = str(int(resident))
        if resident:
            run(member, work, "ctx")
            user.wait()
        scratch = work / "scratch"
        scratch.mkdir()
        environment = {**member.environment, "TMPDIR": str(scratch)}
        waiting = subprocess.Popen(
            member.command("offload-build", "--progress", "plain", "-"), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert waiting.stdin is not None
        waiting.stdin.write(archive(file("Dockerfile", COPY_ALL), file("x", bytes(3_000_000)))[:-9])
        waiting.stdin.flush()
        time.sleep(1.5)
        assert waiting.poll() is None
        began = time.monotonic()
        waiting.send_signal(signal.SIGINT)
        while waiting.poll() is None:
            assert time.monotonic() - began < 5
            time.sleep(0.02)
        _, errors = waiting.communicate()
        assert waiting.returncode == 130
        assert b"Traceback" not in errors
        assert list(scratch.iterdir()) == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    first = {
        "Dockerfile": COPY_ALL, ".dockerignore": "ign*\n", "ignored": "x",
        "sub/dir/D.dev": "FROM scratch\nCOPY f /sub-f\n", "sub/dir/f": "first\n",
    }  # fmt: skip
    git_repository(tmp_path / "git", tmp_path / "srv" / "app.git", first, {"sub/dir/f": "second\n"})
    members = [file(name, text) for name, text in first.items()]
    write_files(
        tmp_path / "srv",
        {"c.tar.gz": gzip.compress(archive(*members)), "D.txt": "FROM scratch\nWORKDIR /w\n"},
    )
    with web_server(tmp_path / "srv") as url:
        yield url


async def test_git_repository(same: Same, served: str, work: Path) -> None:
    url = f"{served}/app.git"
    assert (await same(url))["sub/dir/f"][3] == b"second\n"
    assert (await same("-f", "D.dev", f"{url}#v1:sub/dir"))["sub-f"][3] == b"first\n"
    (work / "D.local").write_text("FROM scratch\nCOPY ignored /here\n")
    assert "here" in await same("-f", str(work / "D.local"), url)
    assert "here" in await same("-f", "-", url, stdin=(work / "D.local").read_bytes())


async def test_archive_and_dockerfile_over_http(same: Same, served: str) -> None:
    assert (await same(f"{served}/c.tar.gz"))["ignored"][3] == b"x"
    assert set(await same(f"{served}/D.txt")) == {"w"}
    assert set(await same("-f", f"{served}/D.txt", "ctx")) == {"w"}


def test_what_cannot_be_fetched_is_a_failed_build(member: Member, served: str, work: Path) -> None:
    done = run(member, work, f"{served}/none.git")
    assert done.returncode == 1
    assert b"none.git" in done.stderr
    assert run(member, work, f"{served}/none.tar").returncode == 1


async def test_build_of_a_url_is_in_the_shared_cache(
    member: Member, served: str, work: Path
) -> None:
    built(member, work, f"{served}/app.git#main")
    member.wait_published()
    built(member, work, f"{served}/app.git#main")
    stats = member.wait_state("succeeded")["stats"]
    assert stats["steps_cached"] == stats["steps_total"] > 0


async def test_named_directories(same: Same, member: Member, work: Path) -> None:
    found = await same("--build-context", "extra=more", "named")
    assert set(found) == {"kept", ".dockerignore"}
    (work / "named" / "Dockerfile").write_text(
        "FROM scratch\nCOPY --from=dockerfile kept /a\nCOPY --from=extra:2 f /b\n"
        "COPY --from=docker.io/library/context f /c\nCOPY Dockerfile /d\n"
    )
    names = ("dockerfile=more", "extra:2=ctx", "context=ctx")
    flags = [f"--build-context={name}" for name in names]
    assert set(await same(*flags, "named")) == {"a", "b", "c", "d"}
    # A fresh copy elsewhere sends nothing.
    (work / "more").rename(work / "renamed")
    os.utime(work / "renamed" / "kept", (1, 1))
    built(member, work, "--build-context=dockerfile=renamed", *flags[1:], "named")
    assert member.wait_state("succeeded")["stats"]["context_sent_bytes"] == 0


async def test_named_contexts_from_elsewhere(same: Same, served: str, work: Path) -> None:
    (work / "named" / "Dockerfile").write_text(
        "FROM nothing\nCOPY --from=repo sub/dir/f /a\nCOPY --from=tarball context /b\n"
    )
    flags = [
        f"--build-context=repo={served}/app.git#v1",
        f"--build-context=tarball={served}/c.tar.gz",
        "--build-context=nothing=docker-image://scratch",
    ]
    assert set(await same(*flags, "named")) == {"a", "b"}


async def test_layout(same: Same, member: Member, work: Path) -> None:
    layout = OciLayout(work / "layout")
    other = layer({"other": noise("other", 3_000_000)})
    layout.name(layout.image(busybox_layer(), layer({"big": noise("big", 9_000_000)})), tag="1")
    layout.name(layout.image(other), tag="2")
    (work / "named" / "Dockerfile").write_text(
        'FROM base\nRUN ["/bin/busybox", "sh", "-c", "echo $FROM_LAYOUT > /made"]\n'
        "FROM scratch\nCOPY --from=0 /made /made\nCOPY --from=base /big /big\n"
    )
    found = await same("--build-context", "base=oci-layout://layout:1", "named")
    assert (found["made"][3], len(found["big"][3])) == (b"1\n", 9_000_000)
    member.wait_published()
    built(member, work, "--build-context", "base=oci-layout://layout:1", "named")
    stats = member.wait_state("succeeded")["stats"]
    assert stats["steps_cached"] == stats["steps_total"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-f", "-", "-"], "can't use stdin for both build context and dockerfile"),
        (["nowhere"], 'unable to prepare context: path "nowhere" not found'),
        (["--build-context", "extra", "ctx"], "invalid context value: extra, expected key=value"),
        (["--build-context", "Extra=more", "ctx"], "invalid context name Extra: invalid reference"),
        (
            ["--build-context", "extra=none", "ctx"],
            "failed to get build context extra: stat none: no such file or directory",
        ),
        (
            ["--build-context", "extra=target:foo", "ctx"],
            "failed to find target foo for context extra",
        ),
    ],
)
async def test_errors_are_those_of_docker(same: Same, arguments: list[str], sentence: str) -> None:
    done = run(same.member, same.work, *arguments, stdin=archive(*MEMBERS))
    assert done.returncode == 1
    assert sentence in done.stderr.decode()
    assert sentence in str(await same.stock.build(same.work, *arguments, stdin=archive(*MEMBERS)))


def test_windows_path_is_one_sentence(member: Member, work: Path) -> None:
    done = run(member, work, "C:\\src\\app")
    assert done.returncode == 1
    assert done.stderr.decode().strip().count("\n") == 0
    assert "is a Windows path" in done.stderr.decode()


def test_project_settings_come_from_where_the_command_is_started(
    pool: Pool, member: Member, work: Path
) -> None:
    (work / "offload.toml").write_text('project = "no-such-project"\n')
    for arguments in (["-"], ["https://127.0.0.1:1/x.git"]):
        done = run(member, work, *arguments, stdin=archive(*MEMBERS))
        assert b"no-such-project" in done.stderr, done.stderr
