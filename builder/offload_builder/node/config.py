"""Configuration of a node (`offload-builder node`), documented in docs/configuration.md."""

from __future__ import annotations

import platform
import re
from dataclasses import MISSING, dataclass
from pathlib import Path

from offload_builder.node.buildlimits import check_build_limits
from offload_builder.node.entitlements import check_configured
from offload_builder.node.sessions.settings import SessionOptions
from offload_builder.node.steplimits import StepBounds
from offload_cache.collection.timing import MIN_GRACE_SECONDS
from offload_cache.s3config import S3Config
from offload_core.config import option
from offload_core.errors import ConfigError, InvalidValueError
from offload_core.nodelabels import MAX_LABELS, check_label
from offload_core.trust import join_address, split_address

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IPV4 = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
_MEANING_OF_ZERO = {
    "warm_projects": "starts none",
    "step_log_max": "keeps everything",
    "blobs_keep_all": "sets no bound",
    "blobs_idle": "sets no bound",
    "cache_shared_pool_keep": "sets no bound",
    "drain_timeout": "stops at once",
    "step_memory": "gives step_memory_max",
    "step_memory_max": "sets no bound",
    "step_cpus": "gives step_cpus_max",
    "step_cpus_max": "sets no bound",
    "disk_reserve": "leaves nothing",
    "rejoin_wait": "waits for nobody",
    "ended_keep": "keeps nothing",
    "ended_keep_builds": "keeps none",
    "base_images_recheck": "asks a registry each time",
    "base_images_stale": "builds with nothing that a registry does not confirm",
    "cache_mount_interval": "stores after each build",
}
MAX_STEP_LOG_BYTES = 2047 << 20
"""BuildKit reads its bound as a number of 32 bits with a sign."""
ISOLATIONS = ("auto", "netns", "none")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class NodeConfig(SessionOptions):
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
    buildkit_listen: str = option(
        "",
        "address HOST:PORT for docker buildx and other clients of BuildKit's API; when empty, any "
        "free port at the host of listen",
    )
    buildkit_relay_address: str = option(
        "",
        "address HOST:PORT that the gateway's relay dials for them; when empty, that of "
        "buildkit_listen as with relay_address",
    )
    slots: int = option(4, "builds that may run at once")
    labels: dict[str, str] = option(
        {}, "labels by which members choose this node for a session, for example gpu=a100"
    )
    platforms: list[str] = option(
        [],
        "platforms that the node builds natively, and the only ones beside emulated_platforms; "
        "when empty, what the machine runs, and with emulation what QEMU (binfmt_misc) adds",
    )
    emulated_platforms: list[str] = option(
        [],
        "further platforms that the node accepts when no other node builds them natively, for "
        "example for Dockerfiles that cross-compile",
    )
    buildkitd: Path | None = option(None, "path of buildkitd; searched when not set")
    buildkit_idle: float = option(
        900.0, "stop a project's BuildKit after so long without a build", unit="duration"
    )
    warm_projects: int = option(
        2,
        "start the BuildKits of so many of the projects that built lately when the node attaches; "
        "0 starts them with their first builds",
    )
    buildkit_keep: int = option(
        20 * 1024**3,
        "bytes of BuildKit's own cache to keep per project; where branches are protected, as much "
        "again for the builds that write them",
        unit="size",
    )
    step_log_max: int = option(
        1024**3,
        "bytes of output of one step that are shown and kept, at most 2047MiB; of what is longer, "
        "all but the last 256 KiB of the rest is left out; 0 keeps everything",
        unit="size",
    )
    untrusted_keep: int = option(
        4 * 1024**3,
        "bytes of BuildKit's own cache, and as much again of context files, to keep for each "
        "untrusted member of a project; of BuildKit's cache also for builds with a network policy",
        unit="size",
    )
    untrusted_idle: float = option(
        3600.0,
        "remove everything that builds of an untrusted member, or with a network policy of their "
        "own, left on the node after so long without one; their BuildKit is stopped after a "
        "quarter of buildkit_idle",
        unit="duration",
    )
    registry_config: Path | None = option(
        None,
        "TOML file with a [registry] table per host: mirrors, CAs, plain HTTP, the pool's login",
    )
    entitlements: list[str] = option(
        [],
        "rights that builds get when they ask with --allow: network.host, security.insecure, "
        "device or device=PATTERN; each lets a step out of a part of its isolation from the node",
    )
    project_entitlements: dict[str, list[str]] = option(
        {},
        "the same for single projects: a project that fits one of these names or patterns has the "
        "rights listed there, and none of `entitlements`",
    )
    cdi_spec_dirs: list[Path] = option(
        [Path("/etc/cdi"), Path("/var/run/cdi")],
        "directories with CDI specifications of devices that builds may ask for; projects without "
        "a right to devices do not see them",
    )
    isolation: str = option(
        "auto",
        "network of builds: `netns` puts each project behind the node's firewall, in a network "
        "namespace of its own; `none` lets builds reach what the node reaches; `auto` is `netns` "
        "where the node runs as root and the machine can do it",
    )
    dns_servers: list[str] = option(
        [],
        "name servers that names of builds behind the firewall are asked of, ADDRESS or "
        "ADDRESS:PORT; those of /etc/resolv.conf when empty",
    )
    metrics_address: str = option(
        "",
        "address HOST:PORT of counters for Prometheus, over plain HTTP and without login; none "
        "when empty",
    )
    step_memory: int = option(
        0, "memory of each step of a build that asks for none; 0 for step_memory_max", unit="size"
    )
    step_memory_max: int = option(
        0, "most memory that a build can give a step; 0 for no bound", unit="size"
    )
    step_cpus: float = option(
        0.0, "processors of each step of a build that asks for none; 0 for step_cpus_max"
    )
    step_cpus_max: float = option(
        0.0, "most processors that a build can give a step; 0 for no bound"
    )
    build_memory: int = option(
        0, "memory of all steps of a build together; 0 for no bound", unit="size"
    )
    build_cpus: float = option(0.0, "processors of all steps of a build together; 0 for no bound")
    build_pids: int = option(
        0, "processes and threads of all steps of a build together; 0 for no bound"
    )
    build_disk: int = option(
        0,
        "bytes that all steps of a build together may write to the node's disk; 0 for no bound",
        unit="size",
    )
    project_build_limits: dict[str, list[str]] = option(
        {},
        "the same for single projects, by name or pattern: a list of memory=SIZE, cpus=NUMBER, "
        "pids=NUMBER and disk=SIZE; what it does not name is as above",
    )
    disk_reserve: int = option(
        1024**3,
        "free bytes that steps must leave on the node's disk, at most a tenth of it: when there is "
        "less, the step that has written the most is ended; 0 for none",
        unit="size",
    )
    apparmor_profile: str = option(
        "", "AppArmor profile of steps, loaded in the kernel; without one when empty"
    )
    base_images: bool = option(
        True, "keep base images of Docker Hub and of the hosts in registry_config for the pool"
    )
    base_images_recheck: float = option(
        300.0, "ask a registry again what a tag means after so long", unit="duration"
    )
    base_images_stale: float = option(
        7 * 86_400.0,
        "build with what a tag last meant for so long while its registry does not answer",
        unit="duration",
    )
    blobs_keep: int = option(
        20 * 1024**3,
        "bytes of layers, images and cache mounts to keep on disk per project",
        unit="size",
    )
    blobs_keep_all: int = option(
        0,
        "bytes of cache and image blobs to keep on disk for all projects together, the longest "
        "unused go first; 0 for no such bound",
        unit="size",
    )
    blobs_idle: float = option(
        0.0,
        "remove cache and image blobs that were not used for so long; 0 keeps them",
        unit="duration",
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
    cache_shared_keep: int = option(
        50 * 1024**3,
        "bytes of layers, images and cache mounts to keep per project in the shared store; when "
        "there are more, those go first that were of no use for longest",
        unit="size",
    )
    cache_shared_idle: float = option(
        30 * 86_400.0,
        "remove layers and images from the shared store that were of no use for so long",
        unit="duration",
    )
    cache_shared_pool_keep: int = option(
        0, "bytes of layers and images of all projects together; 0 for no such bound", unit="size"
    )
    cache_grace: float = option(
        86_400.0,
        "how long what nothing needs any more stays in the shared store, an hour or more; no build "
        "may run longer without its node reaching the store",
        unit="duration",
    )
    cache_collect_every: float = option(
        3600.0,
        "how often one node of the pool removes what nothing needs from the shared store",
        unit="duration",
    )
    cache_mounts: bool = option(
        True,
        "store the cache mounts of builds in the shared store, and restore them where they are "
        "missing",
    )
    cache_mount_max: int = option(
        2 * 1024**3, "bytes of content up to which a cache mount is stored or restored", unit="size"
    )
    cache_mount_interval: float = option(
        600.0, "store a cache mount at most once in so long", unit="duration"
    )
    s3_endpoint: str = option("", "S3 endpoint URL of the shared cache; none when empty")
    s3_bucket: str = option("offload", "bucket of the shared cache; created when missing")
    s3_prefix: str = option("", "prefix of all keys in the bucket")
    s3_region: str = option("us-east-1", "region of the bucket")
    s3_credentials: str = option(
        "keys",
        "where the keys come from: `keys` (the options below), `aws` (environment, credentials "
        "file, web identity, container or instance metadata), `assume-role` (the keys below take "
        "on a role), `web-identity` (a token file)",
    )
    s3_access_key: str = option("", "access key for the bucket", secret=True)
    s3_secret_key: str = option("", "secret key for the bucket", secret=True)
    s3_session_token: str = option("", "session token that belongs to the keys", secret=True)
    s3_role_arn: str = option("", "role to take on; MinIO needs none")
    s3_sts_endpoint: str = option(
        "", "URL of the STS; AWS's regional one for AWS, else s3_endpoint when empty"
    )
    s3_external_id: str = option("", "external id that the role asks for", secret=True)
    s3_session_policy: Path | None = option(None, "JSON file with a policy that narrows the role")
    s3_web_identity_token_file: Path | None = option(
        None, "file with the token of an OIDC issuer, read again at each renewal"
    )
    s3_addressing: str = option(
        "auto", "`path` (HOST/BUCKET), `virtual` (BUCKET.HOST) or `auto` (virtual on AWS only)"
    )
    s3_ca: Path | None = option(
        None, "PEM file with the authorities of the store's certificate; the system's when not set"
    )
    s3_verify_tls: bool = option(True, "check the store's certificate; leave it on")
    s3_encryption: str = option(
        "",
        "server-side encryption to ask for: `s3` (SSE-S3), `kms` (SSE-KMS) or empty for what the "
        "bucket does by itself",
    )
    s3_kms_key: str = option("", "id or ARN of the key for `kms`")
    rejoin_wait: float = option(
        60.0,
        "how long a build waits for a lost client that it still needs, before it is cancelled; "
        "builds that need nothing more from their client go on without it",
        unit="duration",
    )
    ended_keep: float = option(
        3600.0,
        "how long the log, the result and the image of a build are kept for clients that come "
        "back after its end",
        unit="duration",
    )
    ended_keep_builds: int = option(
        100, "builds that are kept after their end at most, the oldest go first"
    )
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
            "cache_shared_keep",
            "cache_shared_idle",
            "cache_collect_every",
            "buildkit_keep",
            "buildkit_idle",
            "untrusted_keep",
            "untrusted_idle",
            "cache_mount_max",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0")
        for name, zero in _MEANING_OF_ZERO.items():
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; 0 {zero}")
        if self.step_log_max > MAX_STEP_LOG_BYTES:
            raise ConfigError("step_log_max must be 2047MiB or less; 0 keeps everything")
        check_configured(self.entitlements, self.project_entitlements)
        StepBounds.of(self).check()
        check_build_limits(self)
        self.check_sessions()
        self._check_labels()
        if self.cache_grace < MIN_GRACE_SECONDS:
            raise ConfigError("cache_grace must be an hour or more")
        self._check_choices()
        for address in (
            self.gateway,
            self.listen,
            *self.advertise,
            self.relay_address,
            self.buildkit_listen,
            self.buildkit_relay_address,
            self.metrics_address,
        ):
            if address:
                split_address(address)
        if self.s3_endpoint:
            check_bucket(self.s3_bucket)
            self.shared_store()

    def _check_labels(self) -> None:
        if len(self.labels) > MAX_LABELS:
            raise ConfigError(f"labels must be {MAX_LABELS} or fewer")
        for key, value in self.labels.items():
            try:
                check_label(key, value)
            except InvalidValueError as error:
                raise ConfigError(f"labels: {error.message}", hint=error.hint) from error

    def _check_choices(self) -> None:
        for name, allowed in (("log_level", LOG_LEVELS), ("isolation", ISOLATIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f'{name} "{value}" is unknown; use {", ".join(allowed)}')

    def name(self) -> str:
        """Return the node's name in a form that fits a DNS label."""
        raw = (self.node_id or platform.node() or "node").lower().split(".")[0]
        label = "".join(char if char.isascii() and char.isalnum() else "-" for char in raw)
        return label.strip("-")[:40].rstrip("-") or "node"

    def shared_store(self) -> S3Config:
        """Return the bucket of the shared cache and the way to it.

        Raises:
            ConfigError: the options do not go together.
        """
        return S3Config(
            endpoint_url=self.s3_endpoint,
            bucket=self.s3_bucket,
            access_key=self.s3_access_key,
            secret_key=self.s3_secret_key,
            region=self.s3_region,
            prefix=self.s3_prefix,
            session_token=self.s3_session_token,
            credentials=self.s3_credentials,
            role_arn=self.s3_role_arn,
            sts_endpoint=self.s3_sts_endpoint,
            external_id=self.s3_external_id,
            session_policy=self.s3_session_policy,
            web_identity_token_file=self.s3_web_identity_token_file,
            addressing=self.s3_addressing,
            ca_file=self.s3_ca,
            verify_tls=self.s3_verify_tls,
            encryption=self.s3_encryption,
            kms_key=self.s3_kms_key,
        )

    def gateway_address(self) -> str:
        """Return the gateway as HOST:PORT, also when it was written as a URL."""
        return join_address(*split_address(self.gateway))

    def native_platforms(self) -> list[str]:
        """Return the platforms to offer, the machine's own first; see `node.platforms` for more."""
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
