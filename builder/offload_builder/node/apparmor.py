"""Whether the kernel has the AppArmor profile that an administrator names for steps.

BuildKit would find out at the first step of each build only.
Sources: the kernel's admin-guide/LSM/apparmor; containerd's pkg/apparmor (HostSupports).
"""

from __future__ import annotations

from pathlib import Path

from offload_core.errors import ConfigError

_ENABLED = "sys/module/apparmor/parameters/enabled"
_PROFILES = "sys/kernel/security/apparmor/profiles"


def check_profile(name: str, root: Path = Path("/")) -> None:
    """Refuse a profile that no step could have; empty is none.

    Raises:
        ConfigError: with what is missing.
    """
    if not name:
        return
    try:
        enabled = (root / _ENABLED).read_text().startswith("Y")
        loaded = (root / _PROFILES).read_text().splitlines()
    except OSError:
        enabled, loaded = False, []
    if not enabled:
        raise ConfigError(
            f'apparmor_profile is "{name}", but this kernel has no AppArmor, or it is turned off',
            hint="leave apparmor_profile empty; steps keep their seccomp filter and capabilities",
        )
    if name not in (line.rpartition(" (")[0] for line in loaded):
        raise ConfigError(
            f'the AppArmor profile "{name}" is not loaded',
            hint="load it with apparmor_parser -r FILE before the node starts",
        )
