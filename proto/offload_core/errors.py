"""The error tree: every failure that a person or a script can tell apart.

    OffloadError
    ├── BuildFailedError          a step, the Dockerfile or an export failed          exit 1
    │   └── StepMemoryError       a step used more memory than it may                 exit 9
    ├── UsageError                the command line cannot be understood               exit 125
    │   └── InvalidValueError     a flag or argument has a wrong value                exit 1
    │       └── BakeError         a bake file is wrong                                exit 1
    ├── ConfigError               a configuration file or variable is wrong           exit 3
    │   └── ContextError          the build context cannot be read                    exit 1
    ├── AuthenticationError       who are you                                         exit 4
    ├── AccessDeniedError         you may not                                         exit 4
    ├── NotFoundError             no such build, project, node                        exit 5
    │   ├── PlatformUnavailableError  no node of the pool builds a platform           exit 5
    │   ├── DeviceUnavailableError    no node has a device that a build needs         exit 5
    │   └── SessionGoneError      a session has ended and comes not back              exit 5
    ├── QuotaExceededError        a limit is reached                                  exit 6
    │   └── PortTakenError        a port of this machine is in use                    exit 6
    ├── QueueTimeoutError         waited too long for a node                          exit 6
    ├── GatewayUnreachableError   no answer from the gateway                          exit 7
    ├── NodeLostError             the node or its BuildKit died during the build      exit 7
    ├── RegistryAuthError         a registry refused the login                        exit 8
    ├── ContextChangedError       a file changed while it was read                    exit 10
    ├── CacheUnavailableError     the shared cache is away (never ends a build)       exit 11
    ├── DigestMismatchError       bytes are not the ones that their digest names      exit 11
    ├── ImageLoadError            the local engine did not take the image             exit 12
    ├── VersionError              client and gateway do not speak the same version    exit 13
    ├── BuildCanceledError        cancelled by the user or an administrator           exit 130
    └── InternalError             anything else                                       exit 70

1 and 125 are what docker's own commands answer in these cases.
`reason` is the name on the wire and in tests; it is never changed. CI can retry on exit codes
6, 7, 10 and 11.
"""

from __future__ import annotations

from typing import ClassVar


class OffloadError(Exception):
    """Base of all errors that cross a package border.

    Attributes:
        status_code: number of the google.rpc.Code that carries it.
        reason: unique name on the wire.
        exit_code: exit code of our commands.
        retryable: the same call may work later.
        hint: what the person can do next; empty when the message says it.
        shown: the person has already read the message.
        retry_after_seconds: when the same call may work; 0 when that is not known.
    """

    status_code: ClassVar[int] = 13
    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 70
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.retry_after_seconds = 0.0
        self.hint = hint
        self.shown = False

    @property
    def message(self) -> str:
        """The sentence for people, without the hint."""
        return str(self.args[0])


class InternalError(OffloadError):
    """A fault of ours."""


class BuildFailedError(OffloadError):
    """A step, the Dockerfile or an export failed."""

    status_code = 9
    reason = "BUILD_FAILED"
    exit_code = 1


class StepMemoryError(BuildFailedError):
    """A step was ended because it used more memory than its limit, or than the node has."""

    reason = "OUT_OF_MEMORY"
    exit_code = 9


class UsageError(OffloadError):
    """The command line or a request cannot be understood."""

    status_code = 3
    reason = "USAGE"
    exit_code = 125


class InvalidValueError(UsageError):
    """The command line is well-formed, but a flag or argument has a value that cannot be used."""

    reason = "VALUE_INVALID"
    exit_code = 1


class BakeError(InvalidValueError):
    """A bake file is wrong, or does not have what is asked for."""

    reason = "BAKE_FILE_INVALID"


class ConfigError(OffloadError):
    """A configuration file, variable or option has a wrong value."""

    status_code = 3
    reason = "CONFIG_INVALID"
    exit_code = 3


class ContextError(ConfigError):
    """The build context or the Dockerfile cannot be read."""

    reason = "CONTEXT_UNREADABLE"
    exit_code = 1


class AuthenticationError(OffloadError):
    """The caller did not prove who it is."""

    status_code = 16
    reason = "UNAUTHENTICATED"
    exit_code = 4


class AccessDeniedError(OffloadError):
    """The caller is known but may not do this."""

    status_code = 7
    reason = "FORBIDDEN"
    exit_code = 4


class NotFoundError(OffloadError):
    """There is no such thing."""

    status_code = 5
    reason = "NOT_FOUND"
    exit_code = 5


class PlatformUnavailableError(NotFoundError):
    """No node of the pool builds a platform that is wanted, natively or emulated."""

    reason = "PLATFORM_UNAVAILABLE"


class DeviceUnavailableError(NotFoundError):
    """No node that could get the build has a device that it is to use."""

    reason = "DEVICE_UNAVAILABLE"


class SessionGoneError(NotFoundError):
    """A session has ended and comes not back."""

    reason = "SESSION_GONE"


class QuotaExceededError(OffloadError):
    """A limit is reached."""

    status_code = 8
    reason = "QUOTA_EXCEEDED"
    exit_code = 6
    retryable = True


class PortTakenError(QuotaExceededError):
    """A port of this machine is in use, so a session cannot forward it."""

    reason = "PORT_TAKEN"


class QueueTimeoutError(QuotaExceededError):
    """No node became free in time."""

    reason = "QUEUE_TIMEOUT"


class GatewayUnreachableError(OffloadError):
    """The gateway does not answer."""

    status_code = 14
    reason = "UNREACHABLE"
    exit_code = 7
    retryable = True


class NodeLostError(OffloadError):
    """The node or its BuildKit died while it was needed.

    Attributes:
        connection_broke: only the connection is known to be lost; the node may be well.
    """

    connection_broke = False

    status_code = 14
    reason = "NODE_LOST"
    exit_code = 7
    retryable = True


class RegistryAuthError(OffloadError):
    """A registry refused the login."""

    status_code = 9
    reason = "REGISTRY_AUTH"
    exit_code = 8


class ContextChangedError(OffloadError):
    """A file of the build context changed between listing and reading."""

    status_code = 10
    reason = "CONTEXT_CHANGED"
    exit_code = 10
    retryable = True


class CacheUnavailableError(OffloadError):
    """The shared cache does not answer; a build goes on without it."""

    status_code = 14
    reason = "CACHE_UNAVAILABLE"
    exit_code = 11
    retryable = True


class DigestMismatchError(OffloadError):
    """Bytes are not the ones that their digest or size names; none of them was kept."""

    status_code = 15
    reason = "DIGEST_MISMATCH"
    exit_code = 11
    retryable = True


class ImageLoadError(OffloadError):
    """The local container engine did not take the image."""

    status_code = 13
    reason = "IMAGE_LOAD"
    exit_code = 12


class VersionError(OffloadError):
    """Client and gateway do not speak the same version of the protocol."""

    status_code = 9
    reason = "VERSION_MISMATCH"
    exit_code = 13


class BuildCanceledError(OffloadError):
    """The build was cancelled."""

    status_code = 1
    reason = "CANCELED"
    exit_code = 130


def all_errors() -> list[type[OffloadError]]:
    """Return every class of the tree, the base excluded."""
    found: list[type[OffloadError]] = []
    todo: list[type[OffloadError]] = [OffloadError]
    while todo:
        for child in todo.pop().__subclasses__():
            found.append(child)
            todo.append(child)
    return found


def error_for_reason(reason: str) -> type[OffloadError] | None:
    """Return the class whose wire name is `reason`, or None."""
    for cls in all_errors():
        if cls.reason == reason:
            return cls
    return None


def find_offload_error(error: BaseException) -> OffloadError | None:
    """Return the first `OffloadError` in an exception, its groups included, or None."""
    if isinstance(error, OffloadError):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            found = find_offload_error(inner)
            if found is not None:
                return found
    return None
