"""In a pipeline nobody is asked, also where the system gives a terminal."""

from __future__ import annotations

import os
import pty
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from offload_client.build.question import Question
from offload_client.cli.offload import offload
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def terminal() -> Iterator[int]:
    primary, secondary = pty.openpty()
    yield secondary
    os.close(primary)
    os.close(secondary)


@pytest.mark.parametrize(("environment", "asked"), [({}, True), ({"CI": "true"}, False)])
async def test_interrupt_ends_the_build_of_a_pipeline_at_once(
    terminal: int, tmp_path: Path, environment: dict[str, str], asked: bool
) -> None:
    stream = text_stream(terminal)
    invocation = Invocation((), tmp_path, environment, terminal, stream, stream, resident=True)
    ended = SimpleNamespace(done=lambda: False)
    record = SimpleNamespace(result=ended, independent=True, needs="")
    question = Question(invocation, record, lambda _: None, lambda: None, forfeits="")  # type: ignore[arg-type]
    assert question.ask() is asked
    question.close()


def test_pruning_in_a_pipeline_needs_force(terminal: int, tmp_path: Path) -> None:
    stream = text_stream(terminal)
    environment = {"CI": "true", "HOME": str(tmp_path), "OFFLOAD_GATEWAY": "127.0.0.1:1"}
    invocation = Invocation((), tmp_path, environment, terminal, stream, stream)
    with pytest.raises(UsageError, match="--force"):
        offload.main(
            ["cache", "prune", "--all-scopes"], "offload", standalone_mode=False, obj=invocation
        )
