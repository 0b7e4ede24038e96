"""Whether the builds of a node have to be behind the firewall, and can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_builder.egress.firewall.daemonnet import find_cni_plugins
from offload_builder.egress.firewall.router import why_impossible
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from offload_builder.node.config import NodeConfig

_log = structlog.get_logger(__name__)


def wanted(config: NodeConfig, *, must: bool) -> bool:
    """Return whether builds have to be behind the firewall.

    Args:
        config: of the node.
        must: the pool has a policy.

    Raises:
        ConfigError: they have to be, and this machine cannot do it; or the node is told not to.
    """
    if config.isolation == "none":
        if must:
            raise ConfigError(
                "the pool has an egress policy, but isolation = none cannot enforce it",
                hint="set isolation = netns for this node, or take the policy away",
            )
        return False
    reason = why_impossible()
    if not reason:
        try:
            find_cni_plugins()
        except ConfigError as error:
            reason = f"{error.message}; {error.hint}"
    if reason and (must or config.isolation == "netns"):
        raise ConfigError(
            f"builds cannot be put behind the firewall: {reason}",
            hint="isolation = none lets builds reach what the node reaches",
        )
    if reason:
        _log.warning("egress.isolation.off", reason=reason)
    return not reason
