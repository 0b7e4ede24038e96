"""What the gateway and the nodes of `offload-builder up` are configured with.

`up` decides itself where things lie and how its parts find each other; everything else can be set
as for a gateway and a node of their own: options of `up` > variables > file > defaults of `up`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.gateway.config import ENVIRONMENT_PREFIX as GATEWAY_PREFIX
from offload_builder.gateway.config import GatewayConfig
from offload_builder.node.config import NodeConfig
from offload_core.config import load, read_toml
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NODE_PREFIX = "OFFLOAD_NODE"
LISTEN = "127.0.0.1:7443"
ISOLATION = "none"
LOG_LEVEL = "warning"

_GATEWAY_OWN = ("data_dir",)
_NODE_OWN = (
    "gateway", "data", "node_id", "token", "token_file", "listen", "advertise", "relay_address",
)  # fmt: skip


def gateway_config(
    file: Path | None,
    environment: Mapping[str, str],
    data_dir: Path,
    *,
    listen: str | None,
    log_level: str | None,
    protected_branches: Sequence[str],
) -> GatewayConfig:
    """Return the configuration of the pool's gateway.

    Args:
        file: TOML file of a gateway; None for none.
        environment: OFFLOAD_GATEWAY_* count.
        data_dir: for keys and database.
        listen: what the command line says; None for nothing.
        log_level: what the command line says; None for nothing.
        protected_branches: what the command line says; none for nothing.

    Raises:
        ConfigError: with source, key and what is allowed.
    """
    set_there = _set_in(file, environment, GATEWAY_PREFIX, own=_GATEWAY_OWN)
    return load(
        GatewayConfig,
        file=file,
        environment=environment,
        prefix=GATEWAY_PREFIX,
        options={
            "data_dir": str(data_dir),
            "listen": listen or (None if "listen" in set_there else LISTEN),
            "log_level": log_level or (None if "log_level" in set_there else LOG_LEVEL),
            "protected_branches": list(protected_branches) or None,
        },
    )


def node_options(
    file: Path | None,
    environment: Mapping[str, str],
    *,
    slots: int | None,
    log_level: str | None,
    storage: Mapping[str, str],
    isolation: str | None = None,
) -> dict[str, str]:
    """Return what the command line says about nodes, as texts by field of `NodeConfig`.

    Args:
        file: TOML file of a node that all nodes get; None for none.
        environment: OFFLOAD_NODE_* reach all nodes.
        slots: what the command line says; None for nothing.
        log_level: what the command line says; None for nothing.
        storage: the shared cache that the command line names; empty for none.
        isolation: what the command line says. Where nobody says anything, builds share the
            machine's network: on a developer's machine they use registries on localhost.

    Raises:
        ConfigError: what the command line, the file and the variables say does not go together.
    """
    set_there = _set_in(file, environment, NODE_PREFIX, own=_NODE_OWN)
    if storage and "s3_endpoint" in set_there:
        raise ConfigError(
            "the nodes' configuration names an s3_endpoint; leave it out, or --s3 and --minio"
        )
    options = dict(storage)
    if slots is not None:
        options["slots"] = str(slots)
    if log_level or "log_level" not in set_there:
        options["log_level"] = log_level or LOG_LEVEL
    if isolation or "isolation" not in set_there:
        options["isolation"] = isolation or ISOLATION
    return options


def node_config(
    file: Path | None, environment: Mapping[str, str], options: Mapping[str, str]
) -> NodeConfig:
    """Return what a node will make of its configuration, to refuse before anything starts.

    Raises:
        ConfigError: with source, key and what is allowed.
    """
    # The real address is known when the gateway runs.
    known = {"gateway": LISTEN, **options}
    return load(NodeConfig, file=file, environment=environment, prefix=NODE_PREFIX, options=known)


def _set_in(
    file: Path | None, environment: Mapping[str, str], prefix: str, *, own: Sequence[str]
) -> set[str]:
    keys = set(read_toml(file)) if file is not None else set()
    for key in own:
        if key in keys:
            raise ConfigError(f"{file}: leave {key} out; offload-builder up sets it itself")
    begin = f"{prefix}_"
    return keys | {
        name.removeprefix(begin).lower() for name in environment if name.startswith(begin)
    }
