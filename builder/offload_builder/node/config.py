"""Configuration of a node (`offload-builder node`), documented in docs/configuration.md."""

from __future__ import annotations

import platform
import re
from dataclasses import MISSING, dataclass
from pathlib import Path

from offload_core.config import option
from offload_core.errors import ConfigError
from offload_core.trust import join_address, split_address

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IPV4 = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class NodeConfig:
    """One node; field names are the keys of the TOML file."""

    gateway: str = option(MISSING, "address of the gateway, HOST:PORT")
    data: Path = option(Path("/var/lib/offload/node"), "directory for BuildKit, blobs and keys")
    node_id: str = option("", "name of the node; the host name when empty")
    token: str = option("", "enrolment token, needed at the first start only", secret=True)
    token_file: Path | None = option(None, "file that holds the enrolment token")
    listen: str = option("0.0.0.0:7450", "address for clients, HOST:PORT")
    advertise: list[str] = option(
        [], "addresses HOST:PORT that clients dial; empty makes them use the gateway's relay"
    )
    relay_address: str = option(
        "",
        "address HOST:PORT that the gateway's relay dials; when empty, the port of listen at the "
        "address of this machine that leads to the gateway",
    )
    slots: int = option(4, "builds that may run at once")
    platforms: list[str] = option([], "platforms that the node builds; its own when empty")
    buildkitd: Path | None = option(None, "path of buildkitd; searched when not set")
    buildkit_idle: float = option(
        900.0, "stop a project's BuildKit after so long without a build", unit="duration"
    )
    buildkit_keep: int = option(
        20 * 1024**3, "bytes of BuildKit's own cache to keep per project", unit="size"
    )
    registry_config: Path | None = option(
        None, "TOML file with BuildKit's [registry] tables (mirrors, CAs, plain HTTP)"
    )
    blobs_keep: int = option(
        20 * 1024**3, "bytes of cache and image blobs to keep on disk per project", unit="size"
    )
    context_keep: int = option(
        10 * 1024**3, "bytes of build context files to keep per project", unit="size"
    )
    context_shared_keep: int = option(
        20 * 1024**3,
        "bytes of build context files to keep per project in the shared store; when there are "
        "more, those go first that no node stored or read for longest",
        unit="size",
    )
    context_shared_idle: float = option(
        30 * 86_400.0,
        "remove build context files from the shared store that no node stored or read for so long",
        unit="duration",
    )
    s3_endpoint: str = option("", "S3 endpoint URL of the shared cache; none when empty")
    s3_bucket: str = option("offload", "bucket of the shared cache; created when missing")
    s3_prefix: str = option("", "prefix of all keys in the bucket")
    s3_region: str = option("us-east-1", "region of the bucket")
    s3_access_key: str = option("", "access key for the bucket", secret=True)
    s3_secret_key: str = option("", "secret key for the bucket", secret=True)
    drain_timeout: float = option(
        60.0, "how long running builds may go on after a stop was asked for", unit="duration"
    )
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: with the option and what is allowed.
        """
        if self.slots < 1:
            raise ConfigError("slots must be 1 or more")
        for name in (
            "blobs_keep",
            "context_keep",
            "context_shared_keep",
            "context_shared_idle",
            "buildkit_keep",
            "buildkit_idle",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0")
        if self.drain_timeout < 0:
            raise ConfigError("drain_timeout must not be negative; 0 stops at once")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f'log_level "{self.log_level}" is unknown; use {", ".join(LOG_LEVELS)}'
            )
        for address in (self.gateway, self.listen, *self.advertise, self.relay_address):
            if address:
                split_address(address)
        if self.s3_endpoint:
            check_bucket(self.s3_bucket)
        if self.s3_endpoint and not (self.s3_access_key and self.s3_secret_key):
            raise ConfigError("s3_endpoint needs s3_access_key and s3_secret_key as well")

    def name(self) -> str:
        """Return the node's name in a form that fits a DNS label."""
        raw = (self.node_id or platform.node() or "node").lower().split(".")[0]
        label = "".join(char if char.isascii() and char.isalnum() else "-" for char in raw)
        return label.strip("-")[:40].rstrip("-") or "node"

    def gateway_address(self) -> str:
        """Return the gateway as HOST:PORT, also when it was written as a URL."""
        return join_address(*split_address(self.gateway))

    def native_platforms(self) -> list[str]:
        """Return the platforms to offer, the machine's own first."""
        return list(self.platforms) or [machine_platform()]

    def enrolment_token(self) -> str:
        """Return the enrolment token from the value or the file; empty when there is none.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.token or self.token_file is None:
            return self.token
        try:
            return self.token_file.read_text("utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read token_file {self.token_file}: {error.strerror}"
            ) from error


def check_bucket(name: str) -> None:
    """Refuse what cannot be a bucket's name (Amazon S3 user guide, "Bucket naming rules").

    Raises:
        ConfigError: with the name.
    """
    if not _BUCKET.fullmatch(name) or ".." in name or _IPV4.fullmatch(name):
        raise ConfigError(
            f'"{name}" cannot be the name of a bucket; '
            "use 3 to 63 lower-case letters, digits, dots and hyphens"
        )


def machine_platform() -> str:
    """Return this machine as BuildKit names it, for example `linux/amd64`."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "ppc64le": "ppc64le"}
    machine = platform.machine()
    return f"linux/{names.get(machine, machine)}"
