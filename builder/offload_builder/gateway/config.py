"""What can be configured at a gateway: TOML file, OFFLOAD_GATEWAY_* variables, options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offload_core.config import option
from offload_core.errors import ConfigError
from offload_core.trust import split_address

ENVIRONMENT_PREFIX = "OFFLOAD_GATEWAY"
MAX_CURRENCY = 12
"""Characters."""
_MEANING_OF_ZERO = {
    "history_retention": "keeps builds for ever",
    "logs_keep": "sets no bound",
    "logs_retention": "keeps output as long as its build",
    "audit_retention": "keeps records for ever",
    "login_attempts": "sets no bound",
    "login_failures": "sets no bound",
    "token_certificates": "sets no bound",
    "sessions_per_member": "sets no bound",
    "sessions_per_project": "sets no bound",
    "session_retention": "keeps sessions for ever",
    "cost_session_hour": "makes them free",
    "cost_gpu_hour": "makes them free",
}


@dataclass(frozen=True)
class GatewayConfig:
    """Configuration of one gateway process."""

    listen: str = option("0.0.0.0:7443", "Address HOST:PORT of the one public port.")
    public_address: str = option(
        "", "Address HOST:PORT under which clients reach this gateway and its relay."
    )
    data_dir: Path = option(
        Path("/var/lib/offload/gateway"), "Directory of the keys and the SQLite database."
    )
    database_url: str = option(
        "", "SQLAlchemy URL of the database; empty for SQLite in data_dir.", secret=True
    )
    heartbeat_interval: float = option(
        2.0, "How often nodes report; a node is lost after three are missing.", unit="duration"
    )
    reconnect_grace: float = option(
        10.0, "How long a node whose connection broke may take to come back.", unit="duration"
    )
    restart_grace: float = option(
        30.0,
        "How long nodes and waiting clients may take to come back after a restart of the gateway.",
        unit="duration",
    )
    client_grace: float = option(
        10.0,
        "How long a waiting build or session keeps its place when its client's connection breaks.",
        unit="duration",
    )
    queue_timeout: float = option(
        3600.0, "How long a build or a session may wait for a node.", unit="duration"
    )
    max_queued_builds: int = option(1000, "Builds that may wait at once.")
    offer_timeout: float = option(
        3.0, "How long a node may take to accept or decline a build.", unit="duration"
    )
    slot_hold: float = option(
        30.0, "How long a node keeps a slot for a client to arrive.", unit="duration"
    )
    member_certificate_lifetime: float = option(
        7 * 86400.0, "Validity of the certificates of people and pipelines.", unit="duration"
    )
    node_certificate_lifetime: float = option(
        30 * 86400.0, "Validity of the certificates of nodes.", unit="duration"
    )
    default_branches: tuple[str, ...] = option(
        ("main", "master"), "Branches whose cache every build of a project reads."
    )
    protected_branches: tuple[str, ...] = option(
        (), "Patterns of branches whose cache only administrators and pipelines write."
    )
    history_retention: float = option(
        90 * 86400.0, "How long ended builds are kept; 0 for ever.", unit="duration"
    )
    max_log_bytes_per_build: int = option(
        2 << 30,
        "Output of one build that the history keeps, before it is compressed.",
        unit="size",
    )
    logs_keep: int = option(
        20 << 30,
        "Compressed output of all builds that the history keeps; the output of those that ended "
        "first goes first, 0 for no such bound.",
        unit="size",
    )
    logs_retention: float = option(
        30 * 86400.0,
        "How long the output of ended builds is kept; 0 for as long as the builds.",
        unit="duration",
    )
    max_connections: int = option(4096, "Connections at the public port at once.")
    max_connections_per_address: int = option(
        2048,
        "Connections of one address (IPv6: of one network of 64 bits) at once, so that one client "
        "does not take them all.",
    )
    handshake_timeout: float = option(
        5.0, "How long a client may take to say its TLS hello.", unit="duration"
    )
    idle_timeout: float = option(
        600.0, "After how long without a byte a connection is closed.", unit="duration"
    )
    stop_timeout: float = option(
        10.0, "How long calls that run may take to end when the gateway stops.", unit="duration"
    )
    login_attempts: int = option(
        1200,
        "Attempts to log in or to enrol that may come from one address in a minute; 0 for any.",
    )
    login_failures: int = option(
        20, "Those of them that may fail before the address has to wait; 0 for any."
    )
    token_certificates: int = option(
        600, "Certificates that the holder of one token may get in a minute; 0 for any."
    )
    audit_keep: int = option(
        1 << 30, "Size of the audit log; its oldest records go first.", unit="size"
    )
    audit_retention: float = option(
        365 * 86400.0, "How long records of the audit log are kept; 0 for ever.", unit="duration"
    )
    identity_file: Path | None = option(
        None,
        "TOML file of identity providers and rules for their tokens; identity.toml in data_dir "
        "unless set.",
    )
    sessions_per_member: int = option(
        3, "Sessions of one member that may be open at once; 0 for any number."
    )
    sessions_per_project: int = option(
        50, "Sessions of one project that may be open at once; 0 for any number."
    )
    sessions_untrusted: bool = option(False, "Untrusted members may start sessions too.")
    session_start_timeout: float = option(
        60.0, "How long a node may take to make a session.", unit="duration"
    )
    session_retention: float = option(
        30 * 86400.0, "How long ended sessions are kept; 0 for ever.", unit="duration"
    )
    cost_currency: str = option(
        "", "Currency of the rates below, for example EUR; no cost is shown when empty."
    )
    cost_session_hour: float = option(
        0.0, "Price of one hour of a session, for its processors, memory and disk."
    )
    cost_gpu_hour: float = option(0.0, "Price of one hour of each GPU of a session, beside that.")
    metrics_address: str = option(
        "",
        "Address HOST:PORT of counters for Prometheus, over plain HTTP and without login; none "
        "when empty.",
    )
    log_level: str = option("info", "Least severe events that are logged.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: with the option and its limit.
        """
        positive = (
            "heartbeat_interval",
            "reconnect_grace",
            "restart_grace",
            "client_grace",
            "queue_timeout",
            "max_queued_builds",
            "offer_timeout",
            "slot_hold",
            "member_certificate_lifetime",
            "node_certificate_lifetime",
            "max_log_bytes_per_build",
            "max_connections",
            "max_connections_per_address",
            "idle_timeout",
            "stop_timeout",
            "handshake_timeout",
            "audit_keep",
            "session_start_timeout",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0")
        for name, zero in _MEANING_OF_ZERO.items():
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; 0 {zero}")
        if not self.cost_currency and (self.cost_session_hour or self.cost_gpu_hour):
            raise ConfigError(
                "cost_session_hour and cost_gpu_hour need cost_currency; set it, for example to EUR"
            )
        if len(self.cost_currency) > MAX_CURRENCY or not self.cost_currency.isprintable():
            raise ConfigError(f"cost_currency has at most {MAX_CURRENCY} printable characters")
        if self.metrics_address:
            split_address(self.metrics_address)
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(
                f'log_level "{self.log_level}" is unknown; use debug, info, warning or error'
            )
