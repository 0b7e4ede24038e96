"""What the docker engines of sessions are told of registries: a part of dockerd's settings.

Logins are no part of it. What is pulled from registries of the configuration comes through the node
as a rule (`guard.images`); this is for what does not, such as pushes.

Source: moby's daemon/pkg/registry (`insecure-registries` and `registry-mirrors` of daemon.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.egress.firewall.addresses import DEFAULT_PROJECTS
from offload_cache.mirror.upstream import DOCKER_HUB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_builder.buildkit.daemon_config import RegistrySettings


def registry_options(settings: Mapping[str, RegistrySettings]) -> dict[str, list[str]]:
    """Return settings of dockerd.

    Args:
        settings: the registries of the node's configuration, by host.
    """
    plain = [host for host, one in settings.items() if one.http or one.insecure]
    # The node's registry speaks HTTP at its gateway address, which is one of these.
    options = {"insecure-registries": [str(DEFAULT_PROJECTS), *plain]}
    hub = settings.get(DOCKER_HUB)
    # An engine takes mirrors for Docker Hub only, and none below a path.
    mirrors = [_with_scheme(mirror, settings) for mirror in (hub.mirrors if hub else ())]
    if known := [mirror for mirror in mirrors if mirror.count("/") == 2]:
        options["registry-mirrors"] = known
    return options


def _with_scheme(mirror: str, settings: Mapping[str, RegistrySettings]) -> str:
    mirror = mirror.rstrip("/")
    if "://" in mirror:
        return mirror
    own = settings.get(mirror.partition("/")[0])
    return f"http://{mirror}" if own is not None and own.http else f"https://{mirror}"
