"""Configuration of a node (`offload-builder node`), documented in docs/configuration.md."""

from __future__ import annotations

import platform
from dataclasses import MISSING, dataclass
from pathlib import Path

from offload_core.config import option
from offload_core.errors import ConfigError


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
    relay_address: str = option("", "address that the gateway's relay dials; listen when empty")
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

    def name(self) -> str:
        """Return the node's name in a form that fits a DNS label."""
        raw = (self.node_id or platform.node() or "node").lower().split(".")[0]
        return "".join(char if char.isalnum() else "-" for char in raw).strip("-")[:40] or "node"

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


def machine_platform() -> str:
    """Return this machine as BuildKit names it, for example `linux/amd64`."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "ppc64le": "ppc64le"}
    machine = platform.machine()
    return f"linux/{names.get(machine, machine)}"
