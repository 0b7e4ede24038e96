"""Values of secrets: where they come from, and that nothing shows them."""

from __future__ import annotations

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offload_client.build.secretoptions import parse_secrets
from offload_client.build.secretvalues import MAX_BYTES, SecretValues
from offload_client.invocation import Invocation
from offload_core.errors import ContextError, InvalidValueError


def values(folder: Path, *given: str, **environment: str) -> SecretValues:
    invocation = Invocation([], folder, environment, 0, io.StringIO(), io.StringIO())
    return SecretValues(invocation, parse_secrets(given))


def test_secret_without_a_source_is_the_variable_of_its_name_else_the_file(tmp_path):
    (tmp_path / "A").write_bytes(b"file")
    assert values(tmp_path, "id=A", A="variable").read("A") == b"variable"
    assert values(tmp_path, "id=A").read("A") == b"file"
    with pytest.raises(InvalidValueError, match="failed to stat B: no such file"):
        values(tmp_path, "id=B")


def test_variable_counts_more_than_a_file_and_one_that_is_not_set_is_empty(tmp_path):
    (tmp_path / "f").write_bytes(b"file")
    found = values(tmp_path, "id=a,src=f,env=X", "id=b,env=Y", X="variable")
    assert (found.read("a"), found.read("b"), found.read("c")) == (b"variable", b"", None)


def test_secret_that_grows_too_large_after_the_start_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * MAX_BYTES)
    found = values(tmp_path, "id=a,src=f")
    (tmp_path / "f").write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(ContextError, match="too big") as caught:
        found.read("a")
    assert "xx" not in str(caught.value)


def test_value_is_read_once_and_forgotten(tmp_path):
    (tmp_path / "f").write_bytes(b"first")
    found = values(tmp_path, "id=a,src=f")
    assert found.read("a") == b"first"
    (tmp_path / "f").write_bytes(b"second")
    assert found.read("a") == b"first"
    assert "first" not in repr(found)
    found.forget()
    assert found.read("a") == b"second"


def test_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    found = values(tmp_path, "id=a,src=f")
    (tmp_path / "f").unlink()
    with pytest.raises(ContextError, match="secret a: cannot read f: No such file"):
        found.read("a")


def test_pipe_that_is_asked_for_twice_at_once_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = values(tmp_path, "id=a,src=pipe")
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(found.read, "a") for _ in range(2)]
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write(b"one ")
            time.sleep(0.2)
            pipe.write(b"two")
        try:
            assert [one.result(timeout=10) for one in asked] == [b"one two"] * 2
        except TimeoutError:
            # Let go of a reader that waits for a second writer.
            (tmp_path / "pipe").open("wb").close()
            raise
