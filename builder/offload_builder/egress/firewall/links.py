"""Devices, addresses, routes and kernel settings of the namespace that the thread is in.

By iproute2, in one process for many changes: that takes 5 ms, and the node needs no other program
or library for it.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.egress.policy.model import Address, Network

_SECONDS = 20.0
_SYSCTL = Path("/proc/sys/net")
ANYWHERE = ("default", "0.0.0.0/0", "::/0")


@dataclass(frozen=True, slots=True)
class Outlet:
    """The way from a namespace to everything else.

    Attributes:
        device: that the default route names.
        mtu: of the device, in bytes.
        ipv6: there is a default route for IPv6 as well.
    """

    device: str
    mtu: int
    ipv6: bool


def run_ip(commands: Sequence[str]) -> None:
    """Do changes with iproute2, in their order; the first one that fails ends it.

    Raises:
        ConfigError: iproute2 is missing, or refused one; the message has the reason.
    """
    _run(["ip", "-batch", "-"], "\n".join(commands) + "\n")


def delete_link(device: str) -> None:
    """Delete a device if it is there.

    Raises:
        ConfigError: it is there and cannot be deleted.
    """
    try:
        if device in device_names():
            run_ip([f"link delete {device}"])
    except ConfigError:
        # It goes by itself as well, with the last process of its namespace.
        if device in device_names():
            raise


def device_names() -> set[str]:
    """Return the devices that there are."""
    return {str(link["ifname"]).partition("@")[0] for link in _query("link", "show")}


def local_addresses() -> list[Address]:
    """Return the addresses of all devices, but for loopback and link-local ones."""
    found = [
        ipaddress.ip_address(entry["local"])
        for link in _query("address", "show")
        for entry in link.get("addr_info", ())
        if "local" in entry
    ]
    return [one for one in found if not (one.is_loopback or one.is_link_local)]


def routed_networks() -> list[Network]:
    """Return the networks that IPv4 routes lead to, but for the default route."""
    return [
        ipaddress.ip_network(str(route["dst"]), strict=False)
        for route in _query("-4", "route", "show", "table", "all")
        if route["dst"] not in ANYWHERE
    ]


def outlet() -> Outlet | None:
    """Return the way out by the default route; None without one."""
    routes4 = _query("-4", "route", "show", "default")
    routes6 = [route for route in _query("-6", "route", "show", "default") if "dev" in route]
    for route in (*routes4, *routes6):
        device = str(route.get("dev", ""))
        if not device:
            continue
        link = _query("link", "show", "dev", device)[0]
        return Outlet(device, int(link["mtu"]), ipv6=bool(routes6))
    return None


def read_setting(name: str) -> str:
    """Return a kernel setting below net; empty where the kernel has none such."""
    try:
        return (_SYSCTL / name).read_text().strip()
    except OSError:
        return ""


def write_setting(name: str, value: str) -> None:
    """Change a kernel setting below net, unless it has that value.

    Raises:
        ConfigError: it cannot be changed.
    """
    if read_setting(name) == value:
        return
    try:
        (_SYSCTL / name).write_text(value)
    except OSError as error:
        raise ConfigError(f"net/{name} cannot be set to {value}: {error.strerror}") from error


def skip_duplicate_detection(device: str) -> None:
    """Have a device use its IPv6 addresses at once; by default it first looks for others for 1 s.

    Raises:
        ConfigError: it cannot be set.
    """
    name = f"ipv6/conf/{device}/accept_dad"
    if read_setting(name):
        write_setting(name, "0")


def configure() -> None:
    """Have a new namespace forward, and believe nothing that it is told about routes.

    Raises:
        ConfigError: it cannot be set.
    """
    for name, value in (
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/all/accept_redirects", "0"),
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/default/rp_filter", "1"),
        ("ipv6/conf/default/accept_ra", "0"),
    ):
        if read_setting(name):
            write_setting(name, value)
    skip_duplicate_detection("default")


def _query(*words: str) -> list[dict[str, Any]]:
    text = _run(["ip", "-json", *words], "")
    found = json.loads(text) if text.strip() else []
    return [item for item in found if item]


def _run(command: Sequence[str], text: str) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError:
        raise ConfigError("the program ip was not found", hint="install iproute2") from None
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"ip did not end within {_SECONDS:g} seconds") from error
    if done.returncode != 0:
        raise ConfigError(f"ip refused a change of the network: {done.stderr.strip()}")
    return done.stdout
