"""How the answers to calls are printed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from offload_client.build.callrequest import CallRequest
from offload_client.build.callresult import call_output, dockerfile_title
from offload_core.errors import InternalError

DOCKERFILE = b"FROM scratch\nMAINTAINER me\nENTRYPOINT run\n"


def warning(rule: str, line: int, **more: Any) -> dict[str, Any]:
    place = {"start": {"line": line}, "end": {"line": line}}
    return {"ruleName": rule, "detail": f"{rule} found", "location": {"ranges": [place]}} | more


def notes(**findings: Any) -> dict[str, bytes]:
    data = base64.b64encode(DOCKERFILE).decode()
    answer = {"sources": [{"filename": "Dockerfile", "data": data}], **findings}
    status = b"1" if findings.get("warnings") or findings.get("buildError") else b"0"
    return {"result.json": json.dumps(answer).encode(), "result.statuscode": status}


def test_findings_are_listed_by_line_with_their_place() -> None:
    found = notes(warnings=[warning("Json", 3), warning("Maintainer", 2, url="https://x.example")])
    text, error = call_output(CallRequest("lint"), found, "app/Dockerfile")
    assert text == (
        "Check complete, 2 warnings have been found!\n"
        "\nWARNING: Maintainer - https://x.example\nMaintainer found\n"
        "app/Dockerfile:2\n--------------------\n"
        "   1 |     FROM scratch\n   2 | >>> MAINTAINER me\n   3 |     ENTRYPOINT run\n"
        "   4 |     \n"
        "--------------------\n"
        "\nWARNING: Json\nJson found\n"
        "app/Dockerfile:3\n--------------------\n"
        "   1 |     FROM scratch\n   2 |     MAINTAINER me\n   3 | >>> ENTRYPOINT run\n"
        "   4 |     \n"
        "--------------------\n"
    )
    assert error is not None
    assert (error.exit_code, error.shown) == (1, True)


def test_no_findings() -> None:
    assert call_output(CallRequest("lint"), notes(warnings=[]), "Dockerfile") == (
        "Check complete, no warnings found.\n", None,
    )  # fmt: skip


def test_findings_can_be_ignored_and_come_as_json() -> None:
    found = notes(warnings=[warning("Json", 3)])
    text, error = call_output(CallRequest("lint", "json", ignore_status=True), found, "Dockerfile")
    assert text == found["result.json"].decode() + "\n"
    assert error is None


def test_dockerfile_that_is_wrong_is_an_error_with_its_place() -> None:
    place = {"ranges": [{"start": {"line": 2}, "end": {"line": 2}}]}
    found = notes(buildError={"message": "unknown instruction", "location": place})
    text, error = call_output(CallRequest("lint"), found, "Dockerfile")
    assert text == ""
    assert error is not None
    assert error.message.startswith("unknown instruction\nDockerfile:2\n---")


def test_other_answers_are_printed_as_the_frontend_wrote_them() -> None:
    found = {"result.txt": b"TARGET DESCRIPTION\n", "result.json": b"{}"}
    assert call_output(CallRequest("targets"), found, "")[0] == "TARGET DESCRIPTION\n"
    assert call_output(CallRequest("targets", "json"), found, "")[0] == "{}\n"
    assert call_output(CallRequest("other"), {"result.json": b"[]"}, "")[0] == "[]\n"


@pytest.mark.parametrize("text", [b"x", b"[]", b'{"warnings": [{}]}', b'{"warnings": 3}'])
def test_findings_that_make_no_sense_are_an_error(text: bytes) -> None:
    with pytest.raises(InternalError, match="cannot be read"):
        call_output(CallRequest("lint"), {"result.json": text}, "Dockerfile")


def test_names_of_dockerfiles() -> None:
    assert dockerfile_title(".", "") == "Dockerfile"
    assert dockerfile_title("app/", "") == "app/Dockerfile"
    assert dockerfile_title(".", "x/Dockerfile") == "x/Dockerfile"
    assert dockerfile_title(".", "-") == "stdin"
