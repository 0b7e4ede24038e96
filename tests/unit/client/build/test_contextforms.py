"""Build contexts that are no directory: standard input, URLs, named contexts, Windows paths."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import io
import lzma
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from offload_client.build.contextfiles import ContextFiles, find_context, open_context
from offload_client.build.options import BuildOptions, parse_build_contexts
from offload_client.build.remotecontext import is_git_over_ssh
from offload_client.build.spec import build_spec
from offload_client.invocation import Invocation
from offload_core.errors import ContextError, InvalidValueError, OffloadError
from tests.fixtures.ociimages import layer
from tests.fixtures.remotefiles import OciLayout, web_server
from tests.fixtures.tarballs import archive, content, entries, file, link
from tests.fixtures.trees import write_files

DOCKERFILE = "FROM scratch\n"


def invocation(cwd: Path, stdin: int = -1, **environment: str) -> Invocation:
    return Invocation([], cwd, environment, stdin, io.StringIO(), io.StringIO())


@contextmanager
def found(
    cwd: Path, path: str, data: bytes | None = None, *, named: tuple[str, ...] = (), given: str = ""
) -> Iterator[ContextFiles]:
    """The files of a build, with `data` on standard input."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(data or b"")
        stdin.seek(0)
        descriptor = stdin.fileno() if data is not None else -1
        options = BuildOptions(path, file=given, contexts=parse_build_contexts(named))
        files = find_context(invocation(cwd, descriptor), options)
        try:
            yield files
        finally:
            files.close()


def problem(cwd: Path, path: str, data: bytes | None = None, **options: object) -> OffloadError:
    with pytest.raises(OffloadError) as caught, found(cwd, path, data, **options):  # type: ignore[arg-type]
        pass
    assert caught.value.exit_code == 1
    return caught.value


def inline(files: ContextFiles) -> dict[tuple[str, str], bytes]:
    return {(item.local_name, item.path): item.data for item in files.inline}


def paths(files: ContextFiles, name: str = "context", **selection: list[str]) -> list[str]:
    return [entry.path for entry in entries(files.sources[name], **selection)]


def zst(data: bytes) -> bytes:
    return zstandard.compress(data)


def zst_frames(data: bytes) -> bytes:
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    return skippable + zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])


@pytest.mark.parametrize(
    "pack",
    [bytes, gzip.compress, bz2.compress, lzma.compress, zst, zst_frames,
     lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:])],
)  # fmt: skip
def test_archive_on_standard_input_is_the_context(tmp_path: Path, pack: object) -> None:
    members = [file("./Dockerfile", DOCKERFILE), file("d/f", "x" * 3000), file(".dockerignore")]
    data = pack(archive(*members))  # type: ignore[operator]
    with found(tmp_path, "-", data) as files:
        # An ignore file in an archive has no meaning, as in BuildKit.
        assert inline(files) == {("dockerfile", "Dockerfile"): DOCKERFILE.encode()}
        assert paths(files) == [".dockerignore", "Dockerfile", "d", "d/f"]
        (f,) = [e for e in entries(files.sources["context"]) if e.path == "d/f"]
        assert content(files.sources["context"], f) == b"x" * 3000
        assert files.root == tmp_path


@pytest.mark.parametrize(
    "given", ["sub/D.dev", "/sub/D.dev", "./sub/../sub/D.dev", "current/D.dev"]
)
def test_dockerfile_option_is_a_path_in_the_archive(tmp_path: Path, given: str) -> None:
    data = archive(file("sub/D.dev", DOCKERFILE), link("current", "sub"))
    with found(tmp_path, "-", data, given=given) as files:
        assert inline(files) == {("dockerfile", "D.dev"): DOCKERFILE.encode()}


def test_lower_case_dockerfile_in_the_archive(tmp_path: Path) -> None:
    with found(tmp_path, "-", archive(file("dockerfile", DOCKERFILE))) as files:
        assert files.dockerfile_name == "dockerfile"


@pytest.mark.parametrize("given", ["", "nope", "../Dockerfile", "d"])
def test_dockerfile_that_the_archive_lacks_is_named(tmp_path: Path, given: str) -> None:
    error = problem(tmp_path, "-", archive(file("d/f")), given=given)
    assert error.message.startswith("failed to read dockerfile: ")


def test_dockerfile_on_standard_input_has_an_empty_context(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not part of it")
    with found(tmp_path, "-", DOCKERFILE.encode()) as files:
        assert inline(files) == {("dockerfile", "Dockerfile"): DOCKERFILE.encode()}
        assert paths(files) == []


def test_dockerfile_on_standard_input_for_a_directory(tmp_path: Path) -> None:
    write_files(tmp_path, {"Dockerfile": "FROM other\n", ".dockerignore": "x\n", "f": ""})
    with found(tmp_path, ".", DOCKERFILE.encode(), given="-") as files:
        assert inline(files) == {
            ("dockerfile", "Dockerfile"): DOCKERFILE.encode(),
            ("context", ".dockerignore"): b"x\n",
        }
        assert paths(files) == [".dockerignore", "Dockerfile", "f"]


def test_combinations_that_docker_refuses(tmp_path: Path) -> None:
    both = problem(tmp_path, "-", b"", given="-")
    assert "can't use stdin for both build context and dockerfile" in both.message
    two = problem(tmp_path, "-", DOCKERFILE.encode(), given="Dockerfile")
    assert "ambiguous Dockerfile source" in two.message
    assert "standard input is empty" in problem(tmp_path, "-", b"").message


def test_standard_input_that_is_closed_is_an_error(tmp_path: Path) -> None:
    assert "cannot read standard input" in problem(tmp_path, "-").message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zst])
@pytest.mark.parametrize("keep", [20, 60, -5])
def test_archive_that_is_damaged_or_cut_off_is_an_error(
    tmp_path: Path, pack: object, keep: int
) -> None:
    data: bytes = pack(archive(file("Dockerfile", os.urandom(5000))))  # type: ignore[operator]
    error = problem(tmp_path, "-", data[:keep])
    assert "damaged or cut off" in error.message


def test_noise_behind_a_magic_number_is_an_error(tmp_path: Path) -> None:
    for magic in (b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"):
        assert "damaged" in problem(tmp_path, "-", magic + bytes(range(256)) * 4).message


def test_full_disk_is_one_clear_sentence(tmp_path: Path) -> None:
    data = archive(file("Dockerfile", DOCKERFILE), file("big", bytes(3_000_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    packed = gzip.compress(data)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        error = problem(tmp_path, "-", packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "no space is left for the copy of the build context" in error.message
    assert "TMPDIR" in error.hint


def test_copy_of_the_archive_is_where_tmpdir_says_and_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    data = archive(file("Dockerfile", DOCKERFILE))
    with tempfile.TemporaryFile() as stdin:
        stdin.write(data)
        stdin.seek(0)
        at = invocation(tmp_path, stdin.fileno(), TMPDIR=str(tmp_path / "t"))
        find_context(at, BuildOptions("-")).close()
        assert list((tmp_path / "t").iterdir()) == []
        (tmp_path / "t").rmdir()
        stdin.seek(0)
        with pytest.raises(ContextError, match="cannot create a temporary file"):
            find_context(at, BuildOptions("-"))


async def test_waiting_for_standard_input_ends_with_the_command(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"FROM scratch\n")
        opened = open_context(invocation(tmp_path, reading), BuildOptions("-"))
        waiting = asyncio.ensure_future(opened.__aenter__())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()
        began = asyncio.get_running_loop().time()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asyncio.get_running_loop().time() - began < 1
        # Nobody reads from it any more.
        os.write(writing, b"x")
        assert os.read(reading, 10) == b"x"
    finally:
        os.close(reading)
        os.close(writing)


async def test_copy_of_the_archive_goes_with_the_build(tmp_path: Path) -> None:
    def spools() -> int:
        found = 0
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += str(path.readlink()).endswith("(deleted)")
        return found

    with tempfile.TemporaryFile() as stdin:
        stdin.write(archive(file("Dockerfile", DOCKERFILE)))
        stdin.seek(0)
        before = spools()
        options = BuildOptions("-")
        async with open_context(invocation(tmp_path, stdin.fileno()), options) as files:
            assert paths(files) == ["Dockerfile"]
            assert spools() > before
        assert spools() == before


@pytest.mark.parametrize(
    ("url", "definition"),
    [
        ("https://host/repo.git", "https://host/repo.git\0/\0Dockerfile"),
        ("https://host/repo.git#main:dir", "https://host/repo.git\0/dir\0Dockerfile"),
        ("https://u:p@HOST/repo.git?ref=v1&subdir=d/", "https://host/repo.git\0/d\0Dockerfile"),
        ("github.com/x/y#v2", "https://github.com/x/y\0/\0Dockerfile"),
        ("git://host/repo", "git://host/repo\0/\0Dockerfile"),
        ("http://host/c.tar.gz?sig=1", "http://host/c.tar.gz\0/\0Dockerfile"),
    ],
)
def test_url_is_fetched_by_the_node(tmp_path: Path, url: str, definition: str) -> None:
    with found(tmp_path, url) as files:
        assert (files.url, files.inline, dict(files.sources)) == (url, [], {})
        assert files.definition == definition
        spec = build_spec(BuildOptions(url), [], files)
        assert (spec.context_url, spec.dockerfile_path) == (url, "Dockerfile")
        assert dict(spec.frontend_attributes) == {}


def test_dockerfile_option_with_a_url(tmp_path: Path) -> None:
    url = "https://host/repo.git"
    with found(tmp_path, url, given="./build/D.dev") as files:
        assert (files.dockerfile_name, files.inline) == ("build/D.dev", [])
    (tmp_path / "D.local").write_text(DOCKERFILE)
    for given, data, name in [
        (str(tmp_path / "D.local"), None, "D.local"),
        ("-", DOCKERFILE.encode(), "Dockerfile"),
    ]:
        with found(tmp_path, url, data, given=given) as files:
            assert inline(files) == {("dockerfile", name): DOCKERFILE.encode()}
            spec = build_spec(BuildOptions(url), [], files)
            assert spec.dockerfile_path == name
            assert dict(spec.frontend_attributes) == {"dockerfilekey": "dockerfile"}
    assert "not a path inside" in problem(tmp_path, url, given="../D").message
    assert "no such file" in problem(tmp_path, url, given=str(tmp_path / "none")).message


@pytest.mark.parametrize("url", ["git@host:x/y.git", "ssh://git@host/x.git", "SSH://host/x"])
def test_git_over_ssh_is_fetched_by_the_node_with_the_default_agent(
    tmp_path: Path, url: str
) -> None:
    with found(tmp_path, url) as files:
        assert files.url == url
    assert is_git_over_ssh(url)
    assert not is_git_over_ssh("https://host/x.git")


@pytest.mark.parametrize("path", ["ftp://host/x", "file:///x", "user@host", "gitlab.com/x/y"])
def test_other_things_are_paths(tmp_path: Path, path: str) -> None:
    assert problem(tmp_path, path).message == f'unable to prepare context: path "{path}" not found'


WINDOWS = ["C:\\x", "c:/x/y", "\\\\server\\share", ".\\dir", "..\\dir"]


@pytest.mark.parametrize("path", WINDOWS)
def test_windows_paths_are_refused_in_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    for error in (
        problem(tmp_path, path),
        problem(tmp_path, ".", given=path),
        problem(tmp_path, ".", named=(f"x={path}",)),
        problem(tmp_path, ".", named=(f"x=oci-layout://{path}",)),
    ):
        assert f'"{path}" is a Windows path' in error.message
        assert "\n" not in error.message


def test_file_with_the_name_of_a_windows_path_is_used(tmp_path: Path) -> None:
    folder = write_files(tmp_path / ".\\dir", {"Dockerfile": DOCKERFILE})
    with found(tmp_path, ".\\dir") as files:
        assert files.root == folder


def test_dockerfile_by_url(tmp_path: Path) -> None:
    write_files(tmp_path, {"web/D.txt": DOCKERFILE, "web/big": b"#" * 2_100_000, "c/f": ""})
    with web_server(tmp_path / "web") as url:
        with found(tmp_path, "c", given=f"{url}/D.txt?x=1") as files:
            assert inline(files) == {("dockerfile", "Dockerfile"): DOCKERFILE.encode()}
        assert "404" in problem(tmp_path, "c", given=f"{url}/none").message
        assert "bigger than" in problem(tmp_path, "c", given=f"{url}/big").message
        secret = url.replace("//", "//me:secret@")
        assert "secret" not in problem(tmp_path, "c", given=f"{secret}/none").message
    assert "cannot get" in problem(tmp_path, "c", given="http://127.0.0.1:1/D").message


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_files(
        tmp_path,
        {"c/Dockerfile": DOCKERFILE, "more/f": "1", "more/g": "", "more/.dockerignore": "g\n"},
    )


def test_named_directories_have_their_own_source_and_ignore_file(tree: Path) -> None:
    named = ("extra=more", "context=c", "dockerfile=more", "oci:x=c", "image=docker-image://a:1")
    with found(tree, "c", named=named) as files:
        assert dict(files.named) == {
            "extra": "local:extra", "context": "local:_context", "dockerfile": "local:_dockerfile",
            "oci:x": "local:_oci:x", "image": "docker-image://a:1",
        }  # fmt: skip
        assert set(files.sources) == {
            "context", "extra", "_context", "_dockerfile", "_oci:x",
        }  # fmt: skip
        assert paths(files, "extra") == [".dockerignore", "f", "g"]
        assert inline(files)["extra", ".dockerignore"] == b"g\n"
        assert dict(build_spec(BuildOptions("c"), [], files).named_contexts) == dict(files.named)


def test_named_contexts_go_with_every_form(tree: Path) -> None:
    for path, data in (("-", DOCKERFILE.encode()), ("-", archive(file("Dockerfile", "x")))):
        with found(tree, path, data, named=("extra=more",)) as files:
            assert set(files.sources) == {"context", "extra"}
    with found(tree, "https://host/x.git", named=("extra=more",)) as files:
        assert set(files.sources) == {"extra"}
        spec = build_spec(BuildOptions("x"), [], files)
        assert dict(spec.frontend_attributes) == {}


def test_named_layout_is_resolved_here(tree: Path) -> None:
    layout = OciLayout(tree / "layout")
    digest = layout.name(layout.image(layer({"a": b"1"})), tag="3")
    with found(tree, "c", named=("base:3=oci-layout://layout:3",)) as files:
        assert dict(files.named) == {"base:3": f"oci-layout://base:3@{digest}"}
        assert f"blobs/{digest.replace(':', '/')}" in paths(files, "oci:base:3")


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("extra", "invalid context value: extra, expected key=value"),
        ("=more", "invalid context name : invalid reference format"),
        (
            "Extra=more",
            "invalid context name Extra: invalid reference format: repository name must",
        ),
        ("ex tra=more", "invalid context name ex tra: invalid reference format"),
        ("a@sha256:1=more", "invalid context name a@sha256:1: invalid reference format"),
        ("extra=", "failed to get build context extra: stat : no such file or directory"),
        ("extra=no", "failed to get build context extra: stat no: no such file or directory"),
        ("extra=more/f", "failed to get build context path more/f: not a directory"),
        ("extra=target:foo", "failed to find target foo for context extra"),
        (
            "extra=oci-layout://no",
            'oci-layout reference "oci-layout://no" could not be resolved: could not read ',
        ),
    ],
)
def test_wrong_named_contexts_are_refused_as_by_docker(
    tree: Path, named: str, sentence: str
) -> None:
    assert problem(tree, "c", named=(named,)).message.startswith(sentence)


def test_names_of_contexts_are_those_of_images_and_the_last_counts() -> None:
    assert parse_build_contexts(["a=1", "", "docker.io/library/a:latest=2", "a:1=3"]) == {
        "a": "2", "a:1": "3",
    }  # fmt: skip
    digest = "sha256:" + "0" * 64
    assert parse_build_contexts([f"ghcr.io/x/y@{digest}=d", "x=a=b"]) == {
        f"ghcr.io/x/y@{digest}": "d", "x": "a=b",
    }  # fmt: skip
    with pytest.raises(InvalidValueError, match="UTF-8"):
        parse_build_contexts(["a=\udcff"])
