"""What the machine itself has to do for a router: forward, hide its address, keep it out.

All rules are in one table of our own. It also holds while a router ends: the kernel takes a dying
namespace's rules away before its devices, and what then passes has not been hidden behind the
router's address, so it goes no further. Where the machine drops what it forwards, as docker has it,
no table of ours can help: an `accept` counts for its own table only. There the two rules that
docker's documentation asks for are put into the chain that docker keeps for others, DOCKER-USER,
or into FORWARD where no docker has made one. They name the router's device and nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.egress.firewall import links
from offload_core.errors import ConfigError, InternalError

if TYPE_CHECKING:
    from offload_builder.egress.firewall.addresses import UplinkAddresses
    from offload_builder.egress.firewall.nft import Nft

_log = structlog.get_logger(__name__)

_SECONDS = 20.0
_DROPPING = "drop"


class HostTable:
    """The machine's side of one router. All methods are for a thread in its namespace.

    Args:
        nft: of the machine's namespace.
        device: the machine's end of the router's uplink.
        addresses: of the uplink.
    """

    def __init__(self, nft: Nft, device: str, addresses: UplinkAddresses) -> None:
        self._nft = nft
        self._device = device
        self._addresses = addresses
        self._table = f"inet offload_{device}"

    def install(self) -> None:
        """Make everything that is missing; safe to call again and again.

        Raises:
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the table.
        """
        links.write_setting("ipv4/ip_forward", "1")
        if (out := links.outlet()) is not None and out.ipv6:
            self._forward_ipv6()
        self._nft.apply(self._text())
        self._pass_other_tables()

    def whole(self) -> bool:
        """Return whether the table is still there."""
        try:
            self._nft.apply(f"list chain {self._table} forward")
        except InternalError:
            return False
        return True

    def repair(self) -> None:
        """Make what somebody has removed since, and pass what drops since.

        Raises:
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the table.
        """
        if not self.whole():
            _log.warning("egress.host.repaired", table=self._table)
            self._nft.apply(self._text())
        links.write_setting("ipv4/ip_forward", "1")
        self._pass_other_tables()

    def remove(self) -> None:
        """Remove the table, and the rules in docker's chain."""
        try:
            self._nft.apply(f"add table {self._table}\ndelete table {self._table}\n")
        except InternalError as error:
            _log.warning("egress.host.table.stuck", table=self._table, error=error.message)
        for program in ("iptables", "ip6tables"):
            for chain in ("DOCKER-USER", "FORWARD"):
                for rule in self._foreign_rules():
                    while _iptables(program, "-C", chain, *rule):
                        if not _iptables(program, "-D", chain, *rule):
                            break

    def _text(self) -> str:
        device, table = self._device, self._table
        return f"""add table {table}
delete table {table}
table {table} {{
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname "{device}" ct state established,related accept
    oifname "{device}" drop
    iifname "{device}" ip saddr != {self._addresses.v4} drop
    iifname "{device}" ip6 saddr != {self._addresses.v6} drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname != "{device}" accept
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain hide {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {self._addresses.v4} oifname != "{device}" masquerade
    ip6 saddr {self._addresses.v6} oifname != "{device}" masquerade
  }}
}}
"""

    @staticmethod
    def _forward_ipv6() -> None:
        if links.read_setting("ipv6/conf/all/forwarding") != "0":
            return
        # A router ignores advertisements, and would lose its own default route with them.
        for device in links.device_names():
            if links.read_setting(f"ipv6/conf/{device}/accept_ra") == "1":
                links.write_setting(f"ipv6/conf/{device}/accept_ra", "2")
        links.write_setting("ipv6/conf/all/forwarding", "1")

    def _foreign_rules(self) -> list[list[str]]:
        note = ["-m", "comment", "--comment", f"offload {self._device}", "-j", "ACCEPT"]
        states = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
        return [["-i", self._device, *note], ["-o", self._device, *states, *note]]

    def _pass_other_tables(self) -> None:
        for family, program in (("ip", "iptables"), ("ip6", "ip6tables")):
            if not self._drops(family):
                continue
            if shutil.which(program, path=_PATH) is None:
                _log.warning("egress.host.forward.blocked", family=family, missing=program)
                continue
            chain = "DOCKER-USER" if _iptables(program, "-S", "DOCKER-USER") else "FORWARD"
            for rule in self._foreign_rules():
                if not _iptables(program, "-C", chain, *rule):
                    done = _iptables(program, "-I", chain, *rule)
                    _log.info("egress.host.forward.allowed", chain=chain, family=family, done=done)

    def _drops(self, family: str) -> bool:
        """Return whether a chain of iptables, old or new, drops what is forwarded."""
        legacy = Path(f"/proc/thread-self/net/{family}_tables_names")
        if legacy.exists() and "filter" in legacy.read_text().split():
            return True
        chains = self._chains()
        return any(
            chain.get("hook") == "forward"
            and chain.get("policy") == _DROPPING
            and chain.get("family") == family
            and chain.get("table") == "filter"
            for chain in chains
        )

    def _chains(self) -> list[dict[str, Any]]:
        text = self._nft.apply("list chains")
        return _parse_chains(text)


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _parse_chains(text: str) -> list[dict[str, Any]]:
    """Return base chains as nft lists them, with the table that each is in."""
    found: list[dict[str, Any]] = []
    family = table = ""
    for raw in text.splitlines():
        words = raw.replace(";", " ").split()
        if words[:1] == ["table"] and len(words) >= 3:
            family, table = words[1], words[2]
        elif words[:1] == ["type"] and "hook" in words:
            policy = words[words.index("policy") + 1] if "policy" in words else ""
            hook = words[words.index("hook") + 1]
            found.append({"family": family, "table": table, "hook": hook, "policy": policy})
    return found


def _iptables(program: str, *arguments: str) -> bool:
    """Run iptables; return whether it did or found what was asked for."""
    try:
        done = subprocess.run(
            [program, "-w", "5", *arguments],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            env={"PATH": _PATH},
        )
    except FileNotFoundError:
        return False
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{program} did not end within {_SECONDS:g} seconds") from error
    return done.returncode == 0
