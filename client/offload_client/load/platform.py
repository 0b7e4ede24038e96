"""Platforms as OCI and docker write them: linux/arm64/v8.

Source: OCI image specification, "Image Index", platform object; the normal forms are containerd's
(package platforms): aarch64 is arm64, x86_64 is amd64, arm64/v8 is arm64, arm is arm/v7.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload_core.errors import UsageError

_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm",
    "armv7l": "arm",
    "armel": "arm",
    "i386": "386",
    "i686": "386",
}
_DEFAULT_VARIANTS = {("arm64", "v8"), ("amd64", "v1")}


@dataclass(frozen=True)
class Platform:
    """Operating system, architecture and variant in their normal form."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Return the normal form of what an engine or an index says."""
        normal = _ARCHITECTURES.get(architecture.lower(), architecture.lower())
        if normal == "arm" and not variant:
            variant = "v6" if architecture.lower() == "armel" else "v7"
        if (normal, variant) in _DEFAULT_VARIANTS:
            variant = ""
        return cls(os.lower(), normal, variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read "linux/arm64" or "linux/arm/v7".

        Raises:
            UsageError: no platform.
        """
        parts = text.strip().split("/")
        if len(parts) not in {2, 3} or not all(parts):
            raise UsageError(f'"{text}" is not a platform; write for example linux/arm64')
        return cls.of(*parts)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
