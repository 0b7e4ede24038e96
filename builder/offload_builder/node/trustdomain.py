"""Trust domains of a project on a node: who shares a BuildKit with whom, where and how much.

A BuildKit's local cache answers all of its clients, its cache mounts are shared by all builds, and
some inputs of a step are no part of its key (proxies, extra hosts, secrets, what the network says).
So builds that trust each other less than their results are trusted never share one. The gateway
puts a build's domain into its ticket.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.daemon_config import find_runc
from offload_builder.buildkit.daemon_leftovers import (
    end_leftovers,
    end_previous_daemon,
    mounts_below,
)
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.egress.policy.ofbuild import BuildPolicy
    from offload_builder.node.config import NodeConfig

log = structlog.get_logger(__name__)

MEMBERS = ""
PROTECTED = "protected"

_UNTRUSTED = re.compile(r"untrusted-[A-Za-z0-9._@+-]{1,64}")
_PASSING_FOLDERS = ("*~untrusted-*", "*~net-*")
_REMOVED = "~removed-"
_PASSING_IDLE_SHARE = 0.25


@dataclass(frozen=True)
class TrustDomain:
    """One domain of one project.

    Attributes:
        project_id: the project.
        name: empty for ordinary members, "protected", or "untrusted-MEMBER".
        narrowed: the policy that its builds have brought; None for none. One BuildKit has one
            policy: builds that share a step there would run it under only one of theirs.
    """

    project_id: str
    name: str = MEMBERS
    narrowed: BuildPolicy | None = None

    def __post_init__(self) -> None:
        """Refuse what the gateway never says; the name becomes one of a directory.

        Raises:
            UsageError: with the name.
        """
        if self.name not in (MEMBERS, PROTECTED) and _UNTRUSTED.fullmatch(self.name) is None:
            raise UsageError(f"{self.name[:100]!a} is no trust domain that this node knows")

    @property
    def is_untrusted(self) -> bool:
        """Whether everything of it is kept apart, and not for long."""
        return self.name not in (MEMBERS, PROTECTED)

    @property
    def is_passing(self) -> bool:
        """Whether what lies on the disk for it alone is kept for a short time only."""
        return self.is_untrusted or self.narrowed is not None

    def folder(self, config: NodeConfig) -> Path:
        """Return where its BuildKit and its table of file times lie."""
        # Neither a project's name nor that of a domain has a "~".
        name = f"{self.project_id}~{self.name}" if self.name else self.project_id
        if self.narrowed is not None:
            name = f"{name}~net-{self.narrowed.key}"
        return config.data / "projects" / name

    def buildkit_keep(self, config: NodeConfig) -> int:
        """Return how many bytes of BuildKit's own cache are kept."""
        kept = config.buildkit_keep
        return min(kept, config.untrusted_keep) if self.is_passing else kept

    def context_keep(self, config: NodeConfig) -> int:
        """Return how many bytes of build context files are kept."""
        kept = config.context_keep
        return min(kept, config.untrusted_keep) if self.is_untrusted else kept

    def buildkit_idle(self, config: NodeConfig) -> float:
        """Return after how many seconds without a build its BuildKit is stopped."""
        idle = config.buildkit_idle
        return min(idle * _PASSING_IDLE_SHARE, config.untrusted_idle) if self.is_passing else idle


def project_of(folder: Path) -> str:
    """Return the project whose domain has a directory."""
    return folder.name.partition("~")[0]


async def set_aside(folder: Path) -> Path | None:
    """Take a domain's directory out of use, with the mounts in it; None when that did not work.

    Nothing may use it any more. What is returned is to be deleted, which can take long.
    """
    root = folder / "buildkit"
    await end_previous_daemon(root / "buildkitd.pid", root)
    await end_leftovers(root, find_runc(None))
    if mounts_below(folder):
        # Deleting through a mount would delete the files of somebody else.
        log.warning("domain.mounts.stuck", path=str(folder))
        return None
    return folder.rename(folder.with_name(_REMOVED + secrets.token_hex(8)))


async def delete(folder: Path) -> None:
    """Delete what was set aside."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def leftovers(config: NodeConfig) -> tuple[list[Path], list[Path]]:
    """Return what an earlier run has left: data of passing domains, and what was set aside."""
    projects = config.data / "projects"
    # The domain of an untrusted member with a policy has a name of both kinds.
    passing = {folder for pattern in _PASSING_FOLDERS for folder in projects.glob(pattern)}
    return sorted(passing), sorted(projects.glob(f"{_REMOVED}*"))
