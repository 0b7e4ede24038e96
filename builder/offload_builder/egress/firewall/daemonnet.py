"""How a BuildKit and its steps are put into the network of a project.

The daemon keeps our mount namespace but for two things that are its own: the file of its name
server, and the directory where CNI plugins keep what they handed out, which so ends with it.
`ip netns exec` would also give it another /sys, without the control groups that runc needs.

Steps get addresses by the CNI plugin ptp, and keep them up to the router: the built-in bridge of
BuildKit hides them, needs iptables, and has no IPv6.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from offload_builder.egress.firewall.projectnet import ProjectNetwork

CNI_VARIABLE = "OFFLOAD_CNI"
_CNI_DIRECTORIES = ("/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin")
_PLUGINS = ("ptp", "host-local", "loopback", "tuning")
_CNI_STATE = Path("/var/lib/cni")
_NETWORK = "offload"
_ENTER = (
    'mount --bind "$0" /etc/resolv.conf && '
    f'mount -t tmpfs -o size=16m,mode=0700 cni {_CNI_STATE} && exec "$@"'
)
POOLED_STEPS = 2
"""Namespaces of steps that BuildKit makes ahead: without one, a step waits for three programs."""


@dataclass(frozen=True, slots=True)
class DaemonNetwork:
    """What a daemon is started with.

    Attributes:
        command_prefix: a command that starts another one in the project's network.
        cni_config: configuration of the steps' network.
        cni_binaries: directory of the plugins.
        pool_size: namespaces of steps to have ready.
    """

    command_prefix: tuple[str, ...]
    cni_config: Path
    cni_binaries: Path
    pool_size: int = POOLED_STEPS


def find_cni_plugins() -> Path:
    """Return the directory of the CNI plugins: $OFFLOAD_CNI or where distributions have them.

    Raises:
        ConfigError: they are not there.
    """
    named = os.environ.get(CNI_VARIABLE)
    for folder in [named] if named else _CNI_DIRECTORIES:
        if all(os.access(Path(folder) / plugin, os.X_OK) for plugin in _PLUGINS):
            return Path(folder)
    where = named or ", ".join(_CNI_DIRECTORIES)
    raise ConfigError(
        f"the CNI plugins {', '.join(_PLUGINS)} are not in {where}",
        hint=f"install containernetworking-plugins, or name their directory in {CNI_VARIABLE}",
    )


def prepare_daemon(root: Path, network: ProjectNetwork) -> DaemonNetwork:
    """Write what a daemon in a project's network needs below its root.

    Raises:
        ConfigError: CNI plugins are missing, or the files cannot be written.
    """
    plugins = find_cni_plugins()
    folder = root / "network"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _CNI_STATE.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = folder / "resolv.conf"
        names.write_text(f"nameserver {network.addresses.gateway_v4}\noptions timeout:2\n")
        # BuildKit takes a chain of plugins only from a file with this ending.
        config = folder / "steps.conflist"
        config.write_text(json.dumps(_conflist(network), indent=2))
    except OSError as error:
        raise ConfigError(
            f"the network of {root} cannot be written: {error.strerror} ({error.filename})"
        ) from error
    prefix = (
        *("nsenter", f"--net={network.namespace}", "--"),
        *("unshare", "--mount", "--propagation", "slave", "--"),
        *("sh", "-c", _ENTER, str(names)),
    )
    return DaemonNetwork(prefix, config, plugins)


def leases_folder(daemon_pid: int) -> Path:
    """Return where the plugin host-local keeps who has which address, as seen from here."""
    return Path(f"/proc/{daemon_pid}/root{_CNI_STATE}/networks/{_NETWORK}")


def _conflist(network: ProjectNetwork) -> dict[str, object]:
    one = network.addresses
    ranges = [[{"subnet": str(one.steps_v4)}]]
    routes = [{"dst": "0.0.0.0/0"}]
    if network.ipv6:
        ranges.append([{"subnet": str(one.steps_v6)}])
        routes.append({"dst": "::/0"})
    plugin = {
        "type": "ptp",
        "ipMasq": False,
        "mtu": network.mtu,
        "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
    }
    plugins: list[dict[str, object]] = [plugin]
    if network.ipv6:
        # By default a device looks for others with its address for two seconds, and ptp waits.
        # The plugin tuning wants to follow another one.
        settings = {"net.ipv6.conf.default.accept_dad": "0"}
        plugins = [{"type": "loopback"}, {"type": "tuning", "sysctl": settings}, plugin]
    return {"cniVersion": "1.0.0", "name": _NETWORK, "plugins": plugins}
