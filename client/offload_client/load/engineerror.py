"""What goes wrong between the docker SDK and an engine, in one class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class EngineError(Exception):
    """The engine refused or vanished; becomes an `ImageLoadError` in the loader.

    `kind` says which of the two: "refused" has the engine's own words, "lost" has no answer.
    """

    def __init__(self, message: str, kind: Literal["refused", "missing", "lost"]) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def disk_full(self) -> bool:
        """Whether the engine's disk is full, which a repetition does not mend."""
        return "no space left" in str(self)


def translate(function: Callable[[], T], doing: str) -> T:
    """Run a blocking SDK call; map what it raises."""
    import docker.errors
    import requests.exceptions
    import urllib3.exceptions

    try:
        return function()
    except docker.errors.NotFound as error:
        raise EngineError(explain(error), "missing") from error
    except docker.errors.DockerException as error:
        raise EngineError(explain(error), "refused") from error
    except (
        requests.exceptions.RequestException,
        # The SDK reads streamed answers below requests.
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise EngineError(f"the connection broke when asked to {doing}", "lost") from error


def explain(error: Exception) -> str:
    """Return the innermost words of an error of the SDK, without its layers of wrapping."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation)
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause)
