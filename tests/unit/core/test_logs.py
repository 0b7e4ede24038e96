"""No planted secret reaches a log, whatever way it takes."""

from __future__ import annotations

import io
import json
import sys

import pytest
import structlog

from offload_core.logs import configure_logs

TOKEN = "ofl_abc123_" + "S3cret-_" * 4 + "_" + "f" * 32
CAPABILITY = "0123456789abcdef" * 3


@pytest.fixture
def logs(monkeypatch):
    before = structlog.get_config()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs("debug", force_json=True)

    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield lines
    structlog.configure(**before)


class Odd:
    def __repr__(self) -> str:
        return f"Odd({TOKEN})"


PLANTED = {
    "in the event": lambda log: log.info(f"login {TOKEN}"),
    "as a value": lambda log: log.info("e", value=TOKEN),
    "in a sentence": lambda log: log.info("e", error=f"cannot use {TOKEN}: refused"),
    "in a list": lambda log: log.info("e", arguments=["--x", f"--token={TOKEN}"]),
    "in a dict": lambda log: log.info("e", environment={"A": {"B": (TOKEN,)}}),
    "in bytes": lambda log: log.info("e", body=TOKEN.encode()),
    "in an object": lambda log: log.info("e", thing=Odd()),
    "by its key": lambda log: log.info("e", s3_secret_key="S3cret-_", password="S3cret-_"),
    "by a nested key": lambda log: log.info("e", config={"token": "S3cret-_"}),
    "in a header": lambda log: log.info("e", header="Authorization: Bearer S3cret-_"),
    "in basic auth": lambda log: log.info("e", header="Basic S3cret-_"),
    "in a URL": lambda log: log.info("e", url="https://user:S3cret-_@host/path"),
    "of the registry": lambda log: log.info("e", reason=f"GET /v2/{CAPABILITY}/cache failed"),
}


@pytest.mark.parametrize("way", PLANTED)
def test_planted_secret_is_masked(logs, way):
    PLANTED[way](structlog.get_logger("x"))
    (line,) = logs()
    text = json.dumps(line)
    assert "S3cret" not in text
    assert CAPABILITY not in text
    assert "***" in text


def test_secret_in_an_exception_is_masked(logs):
    try:
        raise ValueError(f"bad token {TOKEN}")
    except ValueError as error:
        structlog.get_logger("x").error("e", exc_info=error)
    (line,) = logs()
    assert "ValueError" in str(line["exception"])
    assert "S3cret" not in json.dumps(line)


def test_what_is_no_secret_is_readable(logs):
    digest = "sha256:" + "a" * 64
    structlog.get_logger("x").info(
        "build.started", token_id="x4erm", digest=digest, revision="b" * 40, count=3, tokens=5,
        none=None, url="https://host:7443/path",
    )  # fmt: skip
    (line,) = logs()
    assert line["event"] == "build.started"
    assert (line["token_id"], line["digest"], line["revision"]) == ("x4erm", digest, "b" * 40)
    assert (line["count"], line["tokens"], line["none"]) == (3, 5, None)
    assert line["url"] == "https://host:7443/path"


def test_level_is_kept(logs, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs("warning", force_json=True)
    structlog.get_logger("y").info("quiet")
    structlog.get_logger("y").warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]
