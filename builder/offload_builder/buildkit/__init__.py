"""BuildKit's client side: one supervised daemon, its control API, and the sessions of builds.

    daemon      starts, watches and stops a buildkitd
    client      solve, status, prune, disk usage
    session     serves local files, logins, secrets and outputs to a build
    providers   what the node's agent implements for a session
    solve, status, failure   requests, progress and errors as plain values

Nothing outside this package knows BuildKit's messages.
"""

from offload_builder.buildkit.client import BuildkitClient, DaemonInfo, DiskRecord
from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import (
    DaemonSettings,
    RegistrySettings,
    find_buildkitd,
    find_runc,
)
from offload_builder.buildkit.daemon_exit import DaemonExit
from offload_builder.buildkit.failure import SolveFailure
from offload_builder.buildkit.providers import (
    CredentialSource,
    LocalSource,
    LocalTree,
    OutputSink,
    OutputWriter,
    SecretSource,
    SessionProviders,
    StatRun,
)
from offload_builder.buildkit.session import BkSession
from offload_builder.buildkit.solve import Attributed, SolveResult, SolveSpec, new_ref

__all__ = [
    "Attributed",
    "BkSession",
    "BuildkitClient",
    "BuildkitDaemon",
    "CredentialSource",
    "DaemonExit",
    "DaemonInfo",
    "DaemonSettings",
    "DiskRecord",
    "LocalSource",
    "LocalTree",
    "OutputSink",
    "OutputWriter",
    "RegistrySettings",
    "SecretSource",
    "SessionProviders",
    "SolveFailure",
    "SolveResult",
    "SolveSpec",
    "StatRun",
    "find_buildkitd",
    "find_runc",
    "new_ref",
]
