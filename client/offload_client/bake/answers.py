"""--call and --check of bake: what the frontend answered for each target, as buildx prints it.

Source: docker/buildx commands/bake.go, runBake.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload_client.build.callrequest import CallRequest, parse_call
from offload_client.build.callresult import call_output, dockerfile_title
from offload_core.errors import BakeError, BuildFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.bake.plan import BakePlan
    from offload_client.build.options import BuildOptions

EMPTY_CONTEXT = "docker-image://scratch"
"""What a target has for the image of another one that was only asked about, as with buildx.
Source: BuildKit's frontend/dockerui, EmptyImageName."""
_HTML = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
"""As Go writes them in JSON."""


class CallAnswers:
    """The answers of one `offload-build bake`, by target."""

    def __init__(self, call: str, plan: BakePlan, options: Mapping[str, BuildOptions]) -> None:
        """Prepare.

        Args:
            call: value of --call; empty when only targets themselves have one.
            plan: what is asked about.
            options: of each target.

        Raises:
            InvalidValueError: the value cannot be understood.
        """
        self._call = parse_call(call)
        self._plan = plan
        self._options = options
        self._requests: dict[str, CallRequest] = {}
        self._notes: dict[str, Mapping[str, bytes]] = {}

    def check(self) -> None:
        """Refuse a target that is to be built upon one that is only asked about.

        Raises:
            BakeError: with both; docker buildx refuses that too.
        """
        for name, options in self._options.items():
            for other in self._plan.needs(name).values():
                if options.call is None and self._options[other].call is not None:
                    raise BakeError(
                        f"target {name} cannot be built: {other}, which it builds upon, "
                        "is not built, but only asked about",
                        hint=f'remove "call" from target {other}, or give --call=build',
                    )

    def add(self, name: str, request: CallRequest, notes: Mapping[str, bytes]) -> None:
        """Take what the frontend answered for a target."""
        self._requests[name] = request
        self._notes[name] = dict(notes)

    def output(self) -> tuple[str, BuildFailedError | None]:
        """Return what goes to standard output, and how the command ends.

        Raises:
            InternalError: an answer cannot be read.
        """
        if self._call is not None and self._call.format == "json":
            return self._document()
        parts, failed = [], False
        for name in sorted(self._notes):
            text, error = self._answer(name)
            failed |= error is not None
            description = self._plan.targets[name].get("description") or ""
            head = f"{name}\n{description}\n" if description else f"{name}\n"
            parts.append(f"{head}\n{text}{_told(error)}")
        return "\n".join(parts), _ending(failed)

    def _request(self, name: str) -> CallRequest:
        """Return what is asked about a target: a form of the answer is only given with --call."""
        own = self._requests[name]
        if self._call is None:
            return CallRequest(own.name)
        return replace(self._call, name=own.name)

    def _answer(self, name: str) -> tuple[str, BuildFailedError | None]:
        options = self._options[name]
        inline = options.dockerfile_inline is not None
        title = "inline" if inline else dockerfile_title(options.path, options.file)
        return call_output(self._request(name), self._notes[name], title)

    def _document(self) -> tuple[str, BuildFailedError | None]:
        failed = False
        targets: dict[str, Any] = json.loads(self._plan.document())["target"]
        shown: dict[str, Any] = {name: {"build": fields} for name, fields in targets.items()}
        for name in sorted(self._notes):
            text, error = self._answer(name)
            failed |= error is not None
            request = self._request(name)
            try:
                answer: dict[str, Any] = dict(json.loads(text))
            except (TypeError, ValueError):
                answer = {request.name: text}
            if error is not None and not error.shown:
                answer["error"] = _message(error)
            key = "check" if request.name == "lint" else request.name
            shown[name][key] = {part: answer[part] for part in sorted(answer)}
        groups = {name: self._plan.groups[name] for name in sorted(self._plan.groups)}
        document = {"group": groups, "target": shown} if groups else {"target": shown}
        text = json.dumps(document, indent=2, ensure_ascii=False)
        return f"{text.translate(_HTML)}\n", _ending(failed)


def _told(error: BuildFailedError | None) -> str:
    return f"error: {_message(error)}\n" if error is not None and not error.shown else ""


def _message(error: BuildFailedError) -> str:
    """Return what is wrong with a Dockerfile; an excerpt of it is a paragraph of its own."""
    return f"{error.message}\n" if "\n" in error.message else error.message


def _ending(failed: bool) -> BuildFailedError | None:
    if not failed:
        return None
    error = BuildFailedError("the call has findings")
    error.shown = True
    return error
