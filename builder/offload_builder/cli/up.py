"""`offload-builder up`: a whole pool on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from offload_builder.cli import poolconfig
from offload_builder.cli.poolconfig import ISOLATION, LISTEN, LOG_LEVEL
from offload_builder.cli.running import run_until_signal
from offload_builder.gateway.config import ENVIRONMENT_PREFIX as GATEWAY_PREFIX
from offload_core.errors import ConfigError, GatewayUnreachableError
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from offload_builder.gateway.app import Gateway
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.provider.process import SupervisedProcess

READY_SECONDS = 60.0
STOP_SECONDS = 110.0
"""A node drains for 60 s (`drain_timeout`), and then ends its BuildKits."""
MAX_NODES = 32
MAX_DEATHS = 3
"""A child that ends so often while the pool starts will not come up."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ObjectStorage:
    """The shared cache of the pool."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    prefix: str = ""
    session_token: str = ""
    region: str = ""

    def node_settings(self) -> dict[str, str]:
        """Return the NodeConfig fields."""
        settings = {
            "s3_endpoint": self.endpoint,
            "s3_bucket": self.bucket,
            "s3_credentials": "keys",
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
            "s3_session_token": self.session_token,
            "s3_prefix": self.prefix,
        }
        return settings | ({"s3_region": self.region} if self.region else {})

    def __repr__(self) -> str:
        return f"ObjectStorage({self.endpoint}/{self.bucket})"


@click.command()
@click.option(
    "--nodes",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_NODES),
    help="Number of nodes.",
)
@click.option(
    "--s3",
    "s3_url",
    metavar="URL",
    help="Shared cache in S3: http[s]://HOST[:PORT]/BUCKET[/PREFIX]; keys come from "
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, the region from AWS_REGION.",
)
@click.option("--minio", is_flag=True, help="Run a MinIO beside the nodes as the shared cache.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/lib/offload"),
    show_default=True,
    help="Directory for everything that is kept.",
)
@click.option("--listen", help=f"Public address of the gateway, HOST:PORT.  [default: {LISTEN}]")
@click.option(
    "--node-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of this machine that nodes listen on.",
)
@click.option("--slots", type=click.IntRange(1), help="Builds at once per node.  [default: 4]")
@click.option(
    "--protected-branch",
    "protected_branches",
    multiple=True,
    metavar="PATTERN",
    help="Branches whose cache only administrators and pipelines write, for example main.",
)
@click.option(
    "--gateway-config",
    envvar=f"{GATEWAY_PREFIX}_CONFIG",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of the gateway, for everything else.",
)
@click.option(
    "--node-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file that all nodes get, for everything else.",
)
@click.option(
    "--isolation",
    type=click.Choice(("none", "netns", "auto")),
    help=f"Network of builds; see docs/isolation.md.  [default: {ISOLATION}]",
)
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error")),
    help=f"Least severe events that are logged.  [default: {LOG_LEVEL}]",
)
def up(
    nodes: int,
    s3_url: str | None,
    *,
    minio: bool,
    data: Path,
    listen: str | None,
    node_host: str,
    slots: int | None,
    protected_branches: tuple[str, ...],
    gateway_config: Path | None,
    node_config: Path | None,
    isolation: str | None,
    log_level: str | None,
) -> None:
    """Run a gateway and nodes on this machine, ready to build.

    OFFLOAD_GATEWAY_* and OFFLOAD_NODE_* variables count as well.

    \b
    Examples:
      offload-builder up
      offload-builder up --nodes 2 --minio --data ./data --protected-branch main
    """
    from offload_core.logs import configure_logs

    if minio and s3_url:
        raise ConfigError("--minio and --s3 exclude each other; give one of them")
    if os.geteuid() != 0:
        raise ConfigError("nodes run BuildKit, which needs root; run this command with sudo")
    data = data.resolve()
    config = poolconfig.gateway_config(
        gateway_config,
        os.environ,
        data / "gateway",
        listen=listen,
        log_level=log_level,
        protected_branches=protected_branches,
    )
    storage = parse_s3_url(s3_url, os.environ) if s3_url else None
    if minio:
        storage = _minio_storage()
    options = poolconfig.node_options(
        node_config,
        os.environ,
        slots=slots,
        log_level=log_level,
        storage=storage.node_settings() if storage else {},
        isolation=isolation,
    )
    shared = poolconfig.node_config(node_config, os.environ, options)
    configure_logs(config.log_level)
    pool = Pool(
        nodes,
        data,
        config,
        node_host,
        options,
        node_config.resolve() if node_config else None,
        f"{shared.s3_endpoint}, bucket {shared.s3_bucket}" if shared.s3_endpoint else "",
    )
    asyncio.run(run_until_signal(pool.run(storage if minio else None)))


class Pool:
    """Everything that `up` starts."""

    def __init__(
        self,
        nodes: int,
        data: Path,
        config: GatewayConfig,
        node_host: str,
        node_options: dict[str, str],
        node_config: Path | None,
        shared_cache: str,
    ) -> None:
        """Set what is started.

        Args:
            nodes: how many.
            data: for everything that is kept.
            config: of the gateway.
            node_host: address of this machine that nodes listen on.
            node_options: fields of all nodes' configuration, as texts.
            node_config: file with others; None for none.
            shared_cache: for people; empty for none.
        """
        self._nodes = nodes
        self._data = data
        self._config = config
        self._node_host = node_host
        self._node_options = node_options
        self._node_config = node_config
        self._shared_cache = shared_cache

    async def run(self, minio: ObjectStorage | None) -> None:
        """Start, print what to type next, and serve until cancelled.

        Args:
            minio: the storage that a MinIO beside the nodes is to be; None for no MinIO.
        """
        from offload_builder.datalock import DataLock
        from offload_builder.gateway.app import Gateway

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(DataLock(self._data, "offload-builder up"))
            if minio is not None:
                await self._start_minio(stack, minio)
            gateway = await stack.enter_async_context(Gateway(self._config))
            token = gateway.take_first_token()
            try:
                nodes = await self._start_nodes(stack, gateway)
                await self._wait_attached(gateway, nodes)
            except BaseException:
                if token:
                    # It exists now and is not made again; without it nobody could log in.
                    click.echo(f"The pool did not start. Its first token, shown only now: {token}")
                raise
            self._announce(gateway, [node.name for node in nodes], token)
            try:
                await asyncio.Event().wait()
            finally:
                click.echo("Stopping: running builds may end, then everything is shut down ...")

    async def _start_minio(self, stack: AsyncExitStack, storage: ObjectStorage) -> None:
        from offload_builder.provider.process import SupervisedProcess, minio_process

        address = storage.endpoint.removeprefix("http://")
        spec = minio_process(address, self._data / "minio", storage.access_key, storage.secret_key)
        process = await stack.enter_async_context(SupervisedProcess(spec))
        await wait_for_port(address, process)

    async def _start_nodes(
        self, stack: AsyncExitStack, gateway: Gateway
    ) -> list[SupervisedProcess]:
        from offload_builder.provider.process import SupervisedProcess, node_process, stop_all

        nodes: list[SupervisedProcess] = []
        stack.push_async_callback(stop_all, nodes)
        # The kernel chooses the port, also after a restart, and the node tells the gateway.
        address = join_address(self._node_host, 0)
        for number in range(1, self._nodes + 1):
            name = f"node-{number}"
            settings = {
                "gateway": gateway.address,
                "data": str(self._data / name),
                "node_id": name,
                "listen": address,
                "advertise": address,
                **self._node_options,
            }
            if not self._is_enrolled(name):
                settings["token"] = await gateway.create_node_token(name)
            spec = node_process(
                name,
                settings,
                self._data / name / "node.log",
                STOP_SECONDS,
                config_file=self._node_config,
            )
            process = SupervisedProcess(spec)
            nodes.append(process)
            await process.__aenter__()
        return nodes

    def _is_enrolled(self, name: str) -> bool:
        from offload_builder.node.enrolment import load_identity, needs_renewal

        try:
            identity = load_identity(self._data / name / "identity")
        except OSError as error:
            raise ConfigError(f"cannot read the identity of {name}: {error.strerror}") from error
        return identity is not None and not needs_renewal(identity)

    async def _wait_attached(self, gateway: Gateway, nodes: list[SupervisedProcess]) -> None:
        names = [node.name for node in nodes]
        attached = asyncio.ensure_future(gateway.wait_for_nodes(names))
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        try:
            while not attached.done():
                await asyncio.wait((attached,), timeout=POLL_SECONDS)
                for node in nodes:
                    if node.deaths >= MAX_DEATHS and node.name not in gateway.attached_nodes():
                        raise self._not_started(node, "ends again and again")
                if asyncio.get_running_loop().time() > deadline:
                    missing = set(names) - set(gateway.attached_nodes())
                    late = [node for node in nodes if node.name in missing] or nodes
                    raise self._not_started(late[0], f"did not start in {READY_SECONDS:.0f} s")
            attached.result()
        finally:
            attached.cancel()

    def _not_started(self, node: SupervisedProcess, what: str) -> GatewayUnreachableError:
        last = node.log_tail(1)
        return GatewayUnreachableError(
            f"{node.name} {what}; its log is {self._data / node.name / 'node.log'}"
            + (f" and ends with: {last}" if last else "")
        )

    def _announce(self, gateway: Gateway, names: list[str], token: str | None) -> None:
        click.echo(f"Gateway       https://{gateway.address}")
        click.echo(f"Nodes         {', '.join(names)}")
        shared = self._shared_cache or "none (one node's disk)"
        click.echo(f"Shared cache  {shared}")
        click.echo("")
        if token:
            click.echo("Log in with this token, which is shown only now, and build:")
        else:
            click.echo("Log in with your token, and build. A new token is made with")
            click.echo(
                f"  offload-builder token create NAME --role member "
                f"--data-dir {self._data / 'gateway'}"
            )
        click.echo(f"  offload login https://{gateway.address} --token {token or 'TOKEN'}")
        click.echo("  offload-build -t hello --load .")


def parse_s3_url(url: str, environment: os._Environ[str] | dict[str, str]) -> ObjectStorage:
    """Return the storage of http[s]://HOST[:PORT]/BUCKET[/PREFIX].

    Raises:
        ConfigError: not such a URL, or the keys are not in the environment.
    """
    from offload_builder.node.config import check_bucket

    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    bucket, _, prefix = unquote(parts.path).strip("/").partition("/")
    if parts.scheme not in ("http", "https") or not parts.hostname or not bucket:
        raise ConfigError(f'"{url}" is not an S3 URL; write http[s]://HOST[:PORT]/BUCKET[/PREFIX]')
    if parts.username or parts.password:
        raise ConfigError(
            "keys do not belong into the S3 URL, where everybody can see them; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    access, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not access or not secret:
        raise ConfigError(
            "--s3 needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    check_bucket(bucket)
    return ObjectStorage(
        f"{parts.scheme}://{parts.netloc}",
        bucket,
        access,
        secret,
        prefix,
        session_token=environment.get("AWS_SESSION_TOKEN", ""),
        region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION", ""),
    )


def _minio_storage() -> ObjectStorage:
    # New keys at every start: MinIO keeps no data under them, so nothing has to be stored.
    return ObjectStorage(
        f"http://127.0.0.1:{free_port('127.0.0.1')}",
        "offload",
        secrets.token_hex(10),
        secrets.token_hex(20),
    )


def free_port(host: str) -> int:
    """Return a TCP port that is free now."""
    with socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listener:
        port: int = listener.getsockname()[1]
        return port


async def wait_for_port(address: str, process: SupervisedProcess) -> None:
    """Wait until a child listens.

    Raises:
        ConfigError: it does not after a while, or ends again and again.
    """
    host, port = split_address(address)
    deadline = asyncio.get_running_loop().time() + READY_SECONDS
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            if process.deaths >= MAX_DEATHS or asyncio.get_running_loop().time() > deadline:
                raise ConfigError(
                    f"{process.name} does not start; its last words: {process.log_tail(1)}"
                ) from None
            await asyncio.sleep(POLL_SECONDS / 2)
            continue
        writer.close()
        await writer.wait_closed()
        return
