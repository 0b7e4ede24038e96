"""Every form of build context gives with our client what it gives with stock buildx."""

from __future__ import annotations

import gzip
import io
import os
import random
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from offload_client.build.contextfiles import find_context
from offload_client.build.options import BuildOptions, parse_build_contexts
from offload_client.invocation import Invocation
from tests.fixtures.buildkit import running_daemon
from tests.fixtures.clientsources import Buildx, build_files
from tests.fixtures.ociimages import busybox_layer, layer
from tests.fixtures.ports import free_port
from tests.fixtures.remotefiles import OciLayout, git_repository, web_server
from tests.fixtures.tarballs import archive, file, folder, hard_link, link
from tests.fixtures.trees import write_files

COPY_ALL = "FROM scratch\nCOPY . /\n"


@pytest.fixture
async def client():
    async with running_daemon() as daemon:
        yield daemon.client


@pytest.fixture
def stock(client, tmp_path):
    (tmp_path / "home").mkdir()
    return Buildx(tmp_path / "home", client.socket_path)


@pytest.fixture
def work(tmp_path) -> Path:
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


class Same:
    """Builds both ways; the results must be alike."""

    def __init__(self, client, stock, cwd: Path) -> None:
        self.client, self.stock, self.cwd = client, stock, cwd
        self.source = None

    async def ours(self, path, stdin=b"", given="", named=()):
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            invocation = Invocation([], self.cwd, {}, file.fileno(), io.StringIO(), io.StringIO())
            options = BuildOptions(path, file=given, contexts=parse_build_contexts(named))
            files = find_context(invocation, options)
            try:
                found, self.source = await build_files(self.client, files, options)
                return found
            finally:
                files.close()

    async def __call__(self, path, stdin=b"", given="", named=()):
        found = await self.ours(path, stdin, given, named)
        flags = [f"--build-context={text}" for text in named] + (["-f", given] if given else [])
        expected = await self.stock.build(self.cwd, *flags, path, stdin=stdin)
        assert found == expected
        return found


@pytest.fixture
def same(client, stock, work) -> Same:
    return Same(client, stock, work)


async def test_archive_on_standard_input(same):
    members = [
        file("./Dockerfile", COPY_ALL), file(".dockerignore", "ign*\n"), file("ignored", "x"),
        file("made/up/f", "1"), file("exe", "#!", mode=0o755), file("set", "", mode=0o4755),
        folder("real"), link("one", "real"), file("one/in", "i"), link("out", "../../etc"),
        file("z/data", "same"), hard_link("a", "z/data"), file("twice", "1"), file("twice", "2"),
        folder("dir"), file("dir/x", "1"), file("dir", "now a file"), file("/abs", "3"),
        file("empty"), file("n" * 180, "long"), file("ünï", "é"),
    ]  # fmt: skip
    found = await same("-", archive(*members))
    assert found["ignored"][3] == b"x"
    assert found["real/in"][3] == b"i"
    assert (await same("-", gzip.compress(archive(*members, kind=tarfile.GNU_FORMAT)))) == found


async def test_dockerfile_inside_the_archive(same):
    members = [file("sub/D.dev", "FROM scratch\nCOPY sub/x /y\n"), file("sub/x", "1")]
    assert set(await same("-", archive(*members), given="sub/D.dev")) == {"y"}


async def test_large_and_sparse_files_in_an_archive(same, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "Dockerfile").write_text(COPY_ALL)
    (tmp_path / "t" / "large").write_bytes(random.Random(3).randbytes(11_000_000))
    with (tmp_path / "t" / "sparse").open("wb") as sparse:
        sparse.seek(6_000_000)
        sparse.write(b"x")
        sparse.truncate(9_000_000)
    packed = subprocess.run(
        ["tar", "--format=pax", "--sparse", "-C", tmp_path / "t", "-c", "."],
        check=True,
        capture_output=True,
    ).stdout
    assert len(packed) < 12_000_000
    # Stock buildx loses its connection over standard input of this size.
    expected = await same.stock.build(tmp_path, "t")
    assert await same.ours("-", packed) == expected


async def test_selected_files_of_an_archive_through_links(same):
    dockerfile = "FROM scratch\nCOPY current/*.txt /t/\nCOPY app/x /\n"
    members = [
        file("Dockerfile", dockerfile), link("current", "releases/2"), link("app", "/current"),
        file("releases/1/a.txt"), file("releases/2/b.txt", "b"), file("releases/2/x", "x"),
        file("not/wanted"),
    ]  # fmt: skip
    await same("-", archive(*members))
    (tree,) = same.source.trees
    assert "not/wanted" not in [entry.path for entry in tree.entries]


async def test_dockerfile_on_standard_input(same):
    assert set(await same("-", b"FROM scratch\nWORKDIR /w\n")) == {"w"}
    found = await same("ctx", b"FROM scratch\nCOPY f /g\n", given="-")
    assert found["g"][3] == b"of the context"


@pytest.fixture
def served(tmp_path):
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


async def test_git_repository_over_http(same, served, work):
    url = f"{served}/app.git"
    assert (await same(url))["sub/dir/f"][3] == b"second\n"
    found = await same(f"{url}#v1:sub/dir", given="D.dev")
    assert found["sub-f"][3] == b"first\n"
    assert await same(f"{url}?ref=v1&subdir=sub/dir", given="D.dev") == found
    assert (await same(url, given="sub/dir/../../Dockerfile"))["ignored"][3] == b"x"
    (work / "D.local").write_text("FROM scratch\nCOPY ignored /here\n")
    assert "here" in await same(url, given=str(work / "D.local"))
    assert "here" in await same(url, (work / "D.local").read_bytes(), given="-")
    (work.parent / "srv" / "D.dev").write_text("FROM scratch\nCOPY ignored /web\n")
    assert "web" in await same(url, given=f"{served}/D.dev")


async def test_git_daemon(same, tmp_path, served):
    port = free_port()
    daemon = subprocess.Popen(
        ["git", "daemon", f"--base-path={tmp_path / 'srv'}", "--export-all",
         "--listen=127.0.0.1", f"--port={port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        found = await same(f"git://127.0.0.1:{port}/app.git#main")
        assert found["sub/dir/f"][3] == b"second\n"
    finally:
        os.killpg(daemon.pid, 15)
        daemon.wait(10)


async def test_archive_and_dockerfile_over_http(same, served):
    found = await same(f"{served}/c.tar.gz")
    assert found["ignored"][3] == b"x"
    assert set(await same(f"{served}/D.txt")) == {"w"}


async def test_what_cannot_be_fetched_has_buildkits_words(same, served):
    for url in (f"{served}/none.tar", f"{served}/none.git"):
        found = await same.ours(url)
        expected = await same.stock.build(same.cwd, url)
        assert isinstance(found, str)
        assert expected.endswith(found.strip().splitlines()[-1])


async def test_named_directories(same, work):
    found = await same("named", named=("extra=more",))
    assert set(found) == {"kept", ".dockerignore"}
    (work / "named" / "Dockerfile").write_text(
        "FROM scratch\nCOPY --from=dockerfile kept /a\nCOPY --from=extra:2 f /b\n"
        "COPY --from=docker.io/library/context f /c\nCOPY Dockerfile /d\n"
    )
    named = ("dockerfile=more", "extra:2=ctx", "context=ctx")
    assert set(await same("named", named=named)) == {"a", "b", "c", "d"}


async def test_named_contexts_of_every_remote_kind(same, served, work):
    tarball, image = f"tarball={served}/c.tar.gz", "nothing=docker-image://scratch"
    named = (f"repo={served}/app.git#v1", tarball, image)
    (work / "named" / "Dockerfile").write_text(
        "FROM nothing\nCOPY --from=repo sub/dir/f /a\nCOPY --from=tarball context /b\n"
    )
    assert set(await same("named", named=named)) == {"a", "b"}


@pytest.fixture
def layout(work) -> OciLayout:
    return OciLayout(work / "layout")


async def test_layout_as_base_and_as_source_of_files(same, work, layout):
    big = layer({"big": random.Random(5).randbytes(9_000_000)})
    digest = layout.name(layout.image(busybox_layer(), big), tag="1")
    layout.name(layout.image(layer({"other": b"x"})), tag="2")
    (work / "named" / "Dockerfile").write_text(
        'FROM base\nRUN ["/bin/busybox", "sh", "-c", "echo $FROM_LAYOUT > /made"]\n'
        "FROM scratch\nCOPY --from=0 /made /made\nCOPY --from=base:5000/x /big /big\n"
    )
    named = ("base=oci-layout://layout:1", f"base:5000/x=oci-layout://layout@{digest}")
    found = await same("named", named=named)
    assert found["made"][3] == b"1\n"
    assert len(found["big"][3]) == 9_000_000
    asked = [path for tree in same.source.trees for path in tree.asked]
    assert not any("other" in path for path in asked)


async def test_layout_of_several_platforms_reads_one(same, work, layout):
    mine, other = layer({"a": b"amd"}), layer({"a": b"arm"})
    index = layout.index(layout.image(mine), layout.image(other, architecture="arm64"))
    layout.name(index)
    (work / "named" / "Dockerfile").write_text("FROM extra\n")
    assert (await same("named", named=("extra=oci-layout://layout",)))["a"][3] == b"amd"
    asked = [path for tree in same.source.trees for path in tree.asked]
    assert not any(other.digest.removeprefix("sha256:") in path for path in asked)


async def test_layout_that_lacks_a_blob(same, work, layout):
    missing = layer({"a": b"1"})
    layout.name(layout.image(missing))
    layout.path(missing.digest).unlink()
    (work / "named" / "Dockerfile").write_text("FROM extra\n")
    found = await same.ours("named", named=("extra=oci-layout://layout",))
    assert "not found" in found
