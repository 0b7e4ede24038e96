"""Why a build failed, read from the status of the Solve call.

BuildKit attaches details to the status: a google.rpc.Status whose Any values hold JSON, in spite
of their type. Source: BuildKit's util/grpcerrors and solver/errdefs.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from offload_proto.v1.events_pb2 import SourceRange
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from offload_builder.buildkit.h2.messages import GrpcError

_AUTH = re.compile(
    r"401 unauthorized|403 forbidden|failed to authorize|insufficient_scope|no basic auth"
    r"|authorization failed|authentication required|unexpected status.*: denied|access denied",
    re.IGNORECASE,
)
_DIGEST_MISMATCH = re.compile(r"unexpected commit digest|failed size validation")
_CONTENT_MISSING = re.compile(
    r"could not fetch content descriptor|short read|failed to copy:|content descriptor .*not found"
    r"|sha256:[0-9a-f]{64}: not found|unexpected EOF"
)


_REFUSED_SOURCE = re.compile(r'(?<=source ")((?:[^"\\]|\\.)*)(?=" not allowed by policy)')
_SECRETS_OF_URL = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)

NOT_ALLOWED = "not allowed by policy: action DENY"
"""BuildKit's words for a source that the rules of a session refuse."""


@dataclass(frozen=True, slots=True)
class SolveFailure:
    """A build that failed.

    Attributes:
        message: BuildKit's words.
        vertex: digest of the failing step; empty when it is not known.
        process_exit_code: exit code of the failing process; None when no process failed.
        source_filename: name of the Dockerfile; empty when the place is not known.
        source_data: its content.
        ranges: the places in it, as (start line, start character, end line, end character).
        frontend: name of the frontend that reported the failure; may be empty.
        refusals: why the rules of the session do not let a source be used.
    """

    message: str
    vertex: str = ""
    process_exit_code: int | None = None
    source_filename: str = ""
    source_data: bytes = b""
    ranges: tuple[tuple[int, int, int, int], ...] = ()
    frontend: str = ""
    refusals: tuple[str, ...] = ()

    @property
    def is_registry_auth(self) -> bool:
        """Whether a registry refused the login."""
        return self.process_exit_code is None and bool(_AUTH.search(self.message))

    @property
    def is_digest_mismatch(self) -> bool:
        """Whether content did not have its digest.

        The daemon keeps the wrong bytes and fails again with every source of the same content,
        until `BuildkitDaemon.wipe_ingest`.
        """
        return self.process_exit_code is None and bool(_DIGEST_MISMATCH.search(self.message))

    @property
    def is_cache_fault(self) -> bool:
        """Whether content that was promised could not be read; a build without it may work."""
        if self.process_exit_code is not None:
            return False
        return self.is_digest_mismatch or bool(_CONTENT_MISSING.search(self.message))

    def to_message(self) -> Failure:
        """Return the failure as clients are told of it."""
        auth = self.is_registry_auth and not self.refusals
        return Failure(
            kind=Failure.KIND_REGISTRY_AUTH if auth else Failure.KIND_BUILD,
            message="\n".join((self.message, *self.refusals)),
            vertex=self.vertex,
            process_exit_code=self.process_exit_code or 0,
            source_filename=self.source_filename,
            source_data=self.source_data,
            source_ranges=[
                SourceRange(
                    start_line=start_line,
                    start_character=start_character,
                    end_line=end_line,
                    end_character=end_character,
                )
                for start_line, start_character, end_line, end_character in self.ranges
            ],
        )


def failure_from_status(error: GrpcError) -> SolveFailure:
    """Read a failed Solve call; details that cannot be read are left out."""
    message, found = error.message, _Details()
    if error.details:
        status = Status()
        try:
            status.ParseFromString(error.details)
        except DecodeError:
            pass
        else:
            # The header is cut for some transports; this text is whole.
            message = status.message or message
            for detail in status.details:
                found.take(detail.type_url, detail.value)
    return SolveFailure(
        message=_without_secrets(message),
        vertex=found.vertex,
        process_exit_code=found.exit_code,
        source_filename=found.filename,
        source_data=found.data,
        ranges=found.ranges,
        frontend=found.frontend,
        refusals=tuple(dict.fromkeys(found.refusals)),
    )


def _without_secrets(message: str) -> str:
    """Return BuildKit's words about a refused source without login, query and fragment.

    The record of the build has them, which others read than who has written the address.
    """
    return _REFUSED_SOURCE.sub(lambda found: _SECRETS_OF_URL.sub("", found[1]), message)


class _Details:
    """Collects details; they come from the outermost error to the innermost."""

    def __init__(self) -> None:
        self.vertex = ""
        self.exit_code: int | None = None
        self.filename = ""
        self.data = b""
        self.ranges: tuple[tuple[int, int, int, int], ...] = ()
        self.frontend = ""
        self.refusals: list[str] = []

    def take(self, type_url: str, value: bytes) -> None:
        kind = type_url.rpartition("/")[2]
        try:
            content = json.loads(value)
        except ValueError:
            return
        if not isinstance(content, dict):
            return
        if kind == "errdefs.Vertex+json":
            self.vertex = str(content.get("digest", ""))
        elif kind == "gatewayapi.ExitMessage+json":
            self.exit_code = _number(content.get("Code"))
        elif kind == "errdefs.Frontend+json":
            self.frontend = str(content.get("name", ""))
        elif kind == "errdefs.Source+json":
            self._take_source(content)
        elif kind == "policysession.DecisionResponse+json":
            self._take_refusal(content)

    def _take_refusal(self, content: dict[str, Any]) -> None:
        for item in content.get("denyMessages") or ():
            if isinstance(item, dict) and item.get("message"):
                self.refusals.append(str(item["message"]))

    def _take_source(self, content: dict[str, Any]) -> None:
        info = content.get("info")
        if not isinstance(info, dict):
            return
        self.filename = str(info.get("filename", ""))
        try:
            self.data = base64.b64decode(str(info.get("data", "")))
        except (binascii.Error, ValueError):
            self.data = b""
        self.ranges = tuple(
            (*_position(place.get("start")), *_position(place.get("end")))
            for place in content.get("ranges") or ()
            if isinstance(place, dict)
        )


def _position(content: object) -> tuple[int, int]:
    # Go leaves out numbers that are zero.
    if not isinstance(content, dict):
        return 0, 0
    return _number(content.get("line")), _number(content.get("character"))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
