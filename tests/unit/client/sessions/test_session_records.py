"""Records of sessions on this machine."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from offload_client.invocation import Invocation
from offload_client.sessions import records
from offload_client.sessions.records import (
    RECORD_FILE,
    SessionRecord,
    context_name,
    engine_socket,
    helper_socket,
    list_records,
    prepare_sockets,
    read_record,
    remove_record,
    session_directory,
    write_record,
)
from offload_core.errors import ConfigError, InvalidValueError, NotFoundError

RECORD = SessionRecord("0123456789abcdef", "default", "shop", "h:1", "docker-offload", 17.5)


@pytest.fixture
def invocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invocation:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Invocation.of_process([])


def test_a_record_comes_back_as_it_was(invocation: Invocation) -> None:
    directory = session_directory(invocation, "default")
    write_record(directory, RECORD)
    assert read_record(directory) == RECORD
    assert list_records(invocation) == [RECORD]
    assert stat.S_IMODE((directory / RECORD_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_removed_session_is_not_found(invocation: Invocation) -> None:
    directory = session_directory(invocation, "default")
    assert list_records(invocation) == []
    write_record(directory, RECORD)
    remove_record(directory)
    remove_record(directory)
    with pytest.raises(NotFoundError, match="no session 'default'"):
        read_record(directory)
    assert list_records(invocation) == []


def test_a_broken_record_is_told(invocation: Invocation) -> None:
    directory = session_directory(invocation, "default")
    write_record(directory, RECORD)
    (directory / RECORD_FILE).write_text('{"session_id": 1')
    with pytest.raises(ConfigError, match="cannot read"):
        read_record(directory)
    assert list_records(invocation) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "A", "a" * 64, "."])
def test_a_name_is_a_plain_word(invocation: Invocation, name: str) -> None:
    with pytest.raises(InvalidValueError, match="cannot be the name"):
        session_directory(invocation, name)


def test_contexts_are_named_after_their_sessions() -> None:
    assert context_name("default") == "docker-offload"
    assert context_name("gpu") == "docker-offload-gpu"


def test_sockets_of_a_long_directory_are_elsewhere(tmp_path: Path) -> None:
    assert engine_socket(Path("/s/default")) == Path("/s/default/engine.sock")
    directory = tmp_path / ("x" * 100) / "default"
    write_record(directory, RECORD)
    prepare_sockets(directory)
    place = engine_socket(directory).parent
    assert len(str(helper_socket(directory))) < 100
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    remove_record(directory)
    assert not place.exists()


def test_sockets_are_put_into_nothing_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, victim = tmp_path / "planted" / "sessions" / "0", tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (tmp_path / "planted").symlink_to(victim)
    monkeypatch.setattr(records, "_socket_directory", lambda _: place)
    with pytest.raises(ConfigError, match="no directory of yours"):
        prepare_sockets(tmp_path / "default")
    assert list(victim.iterdir()) == []
    assert stat.S_IMODE(victim.stat().st_mode) == 0o755


def test_sessions_are_at_the_same_place_for_docker_and_for_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.chdir(tmp_path)
    directory = session_directory(Invocation.of_process([]), "default")
    assert directory == tmp_path / "state" / "offload" / "sessions" / "default"
