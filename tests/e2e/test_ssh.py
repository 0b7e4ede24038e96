"""Steps and git contexts use the SSH keys of who builds: they have things signed, no more."""

from __future__ import annotations

import base64
import secrets
import shutil
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from tests.fixtures.contexts import BASE, make_context
from tests.fixtures.pool import Pool
from tests.fixtures.remotefiles import git, git_repository
from tests.fixtures.sshparts import agent_probe, git_over_ssh, new_key, ssh_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member

LIST = "000000010b"
REMOVE_ALL = "0000000113"
FAILURE = "05"
DATA = b"to be signed"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agent_probe(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


@pytest.fixture
def with_agent(member: Member, key: Path) -> Iterator[Member]:
    """A member whose agent has one key."""
    with ssh_agent(key) as path:
        member.environment["SSH_AUTH_SOCK"] = str(path)
        yield member
        del member.environment["SSH_AUTH_SOCK"]


def context(folder: Path, probe: Path, *steps: str) -> Path:
    lines = "".join(f"RUN {step} || exit 1; true $RUN_ID\n" for step in steps)
    make_context(folder, f"COPY agentprobe /bin/\nARG RUN_ID\n{lines}")
    (folder / "agentprobe").write_bytes(probe.read_bytes())
    (folder / "agentprobe").chmod(0o755)
    return folder


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def blob(key: Path) -> bytes:
    """Return the public key as SSH writes it."""
    return base64.b64decode(key.with_name(f"{key.name}.pub").read_text().split()[1])


def sign(key: Path, flags: int = 0) -> str:
    """Return the request for a signature in hexadecimal."""
    body = b"\x0d" + string(blob(key)) + string(DATA) + struct.pack(">I", flags)
    return string(body).hex()


def replies(text: str) -> list[str]:
    """Return what the program printed in steps."""
    return [line.split()[-1] for line in text.splitlines() if " reply " in line]


def build(member: Member, *arguments: str | Path) -> tuple[int, str]:
    done = member.build("--build-arg", f"RUN_ID={secrets.token_hex(4)}", *arguments)
    return done.returncode, done.stderr


def test_step_lists_and_uses_the_keys_of_the_agent_and_changes_nothing_there(
    with_agent: Member, tmp_path: Path, probe: Path, key: Path
) -> None:
    step = f"--mount=type=ssh agentprobe {LIST} {sign(key)} {REMOVE_ALL} {LIST}"
    code, text = build(with_agent, "--ssh", "default", context(tmp_path / "c", probe, step))
    assert code == 0, text
    listed, signed, removed, again = replies(text)
    assert blob(key).hex() in listed and again == listed
    assert removed == FAILURE
    raw = bytes.fromhex(signed)
    public = load_ssh_public_key(key.with_name("key.pub").read_bytes())
    assert raw[0] == 14
    public.verify(raw[-64:], DATA)  # type: ignore[union-attr, call-arg, arg-type]


def test_keys_from_files_serve_steps_without_an_agent(
    member: Member, tmp_path: Path, probe: Path, key: Path
) -> None:
    rsa, curve = new_key(tmp_path / "rsa", "rsa"), new_key(tmp_path / "curve", "ecdsa")
    steps = [
        f"--mount=type=ssh,id=own agentprobe {LIST}",
        f"--mount=type=ssh,id=own agentprobe {sign(key)} {sign(rsa, 4)} {sign(curve)} {REMOVE_ALL}",
    ]
    code, text = build(
        member, "--ssh", f"own={key},{rsa},{curve}", context(tmp_path / "c", probe, *steps)
    )
    assert code == 0, text
    listed, ed25519, sha512, ecdsa, removed = replies(text)
    assert [blob(each).hex() in listed for each in (key, rsa, curve)] == [True, True, True]
    assert b"ssh-ed25519" in bytes.fromhex(ed25519)
    assert b"rsa-sha2-512" in bytes.fromhex(sha512)
    assert b"ecdsa-sha2-nistp256" in bytes.fromhex(ecdsa)
    assert removed == FAILURE


def test_step_without_a_forwarded_agent_fails_unless_it_can_do_without(
    member: Member, tmp_path: Path, probe: Path
) -> None:
    code, text = build(
        member, context(tmp_path / "a", probe, "--mount=type=ssh,required=true true")
    )
    assert code == 1 and "forwarded from the client" in text
    assert "Give --ssh default" in text
    step = "--mount=type=ssh ! agentprobe " + LIST
    code, text = build(member, context(tmp_path / "b", probe, step))
    assert code == 0, text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("default", "SSH_AUTH_SOCK is not set"),
        ("x=missing", "failed to stat missing: no such file or directory"),
        ("x=nokey", "failed to parse nokey"),
        ("x=locked", "has a passphrase"),
    ],
)
def test_agent_that_cannot_be_had_is_refused_before_the_build(
    member: Member, tmp_path: Path, given: str, sentence: str
) -> None:
    (member.home / "nokey").write_text("no key")
    if not (member.home / "locked").exists():
        new_key(member.home / "locked", passphrase="secret")
    code, text = build(member, "--ssh", given, make_context(tmp_path / "c"))
    assert code == 1
    assert sentence in text


def test_agent_that_goes_away_ends_the_connection_of_the_step_and_is_named(
    with_agent: Member, tmp_path: Path, probe: Path
) -> None:
    import socket

    path = tmp_path / "gone"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    step = f"--mount=type=ssh ! agentprobe {LIST}"
    code, text = build(with_agent, "--ssh", f"default={path}", context(tmp_path / "c", probe, step))
    assert code == 0, text
    assert "the SSH agent cannot be used" in text


def test_context_comes_from_git_over_ssh(with_agent: Member, tmp_path: Path, key: Path) -> None:
    repository = git_repository(
        tmp_path / "work", tmp_path / "repo.git",
        {"Dockerfile": "FROM scratch\nCOPY f /\n", "f": "over ssh"},
    )  # fmt: skip
    git(tmp_path, "config", "--global", "--add", "safe.directory", "*")
    with git_over_ssh(key) as port:
        url = f"ssh://root@127.0.0.1:{port}{repository}#main"
        code, text = build(with_agent, "-o", tmp_path / "out", url)
        assert code == 0, text
        assert (tmp_path / "out" / "f").read_text() == "over ssh"
        other = new_key(tmp_path / "other")
        code, text = build(with_agent, "--no-cache", "--ssh", f"default={other}", url)
        assert code == 1 and "ermission denied" in text


def test_cache_of_a_context_over_ssh_is_exported(tmp_path: Path, key: Path) -> None:
    steps = f"{BASE}COPY f /\nARG WHO\nRUN echo $WHO; cat /proc/sys/kernel/random/uuid > /made\n"
    tree = {"Dockerfile": steps, "f": "1", "busybox": Path("/bin/busybox").read_bytes()}
    work, repository = tmp_path / "work", tmp_path / "repo.git"
    git_repository(
        work, repository,
        {f"{folder}{name}": data for folder in ("", "sub/") for name, data in tree.items()},
    )  # fmt: skip
    for folder in (work, work / "sub"):
        (folder / "busybox").chmod(0o755)
    git(work, "commit", "--quiet", "--all", "--message", "modes")
    git(work, "tag", "--annotate", "--message", "m", "v2")
    git(work, "push", "--quiet", repository, "main", "v2")
    git(tmp_path, "config", "--global", "--add", "safe.directory", "*")
    commit = git(work, "rev-parse", "HEAD")
    references = ("", "#main", "#v2", "#refs/tags/v2:sub", f"#{commit}")

    def build_all(pool: Pool, address: str) -> list[str]:
        member = pool.member(SSH_AUTH_SOCK=str(agent))
        made = []
        for reference in references:
            arguments = ("--build-arg", f"WHO={reference}", "-o", tmp_path / "out")
            done = member.build(*arguments, f"{address}{reference}")
            assert done.returncode == 0, done.stderr
            made.append((tmp_path / "out" / "made").read_text())
            wait_exported(member)
        return made

    with git_over_ssh(key) as port, ssh_agent(key) as agent, Pool(1) as pool:
        url = f"ssh://root@127.0.0.1:{port}{repository}"
        first = build_all(pool, url)
        assert len(set(first)) == len(references)
        pool.stop()
        # What BuildKit itself has of the builds; the node's cache lies elsewhere.
        shutil.rmtree(pool.data / "node-1/projects/default/buildkit")
        pool.start()
        assert build_all(pool, url) == first


def wait_exported(member: Member) -> None:
    """Wait until the cache of the last build is there for every node."""
    deadline = time.monotonic() + 60
    while (state := member.builds()[0]["cache_state"]) not in ("published", "unchanged"):
        assert state in ("pending", "unspecified") and time.monotonic() < deadline, state
        time.sleep(0.2)
