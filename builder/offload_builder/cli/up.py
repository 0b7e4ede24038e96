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

from offload_builder.cli.running import run_until_signal
from offload_core.errors import ConfigError, GatewayUnreachableError
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from offload_builder.gateway.app import Gateway
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

    def node_settings(self) -> dict[str, str]:
        """Return the NodeConfig fields."""
        return {
            "s3_endpoint": self.endpoint,
            "s3_bucket": self.bucket,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
            "s3_prefix": self.prefix,
        }

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
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
)
@click.option("--minio", is_flag=True, help="Run a MinIO beside the nodes as the shared cache.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/lib/offload"),
    show_default=True,
    help="Directory for everything that is kept.",
)
@click.option(
    "--listen",
    default="127.0.0.1:7443",
    show_default=True,
    help="Public address of the gateway, HOST:PORT.",
)
@click.option(
    "--node-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of this machine that nodes listen on.",
)
@click.option(
    "--slots",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Builds at once per node.",
)
@click.option(
    "--log-level",
    default="warning",
    show_default=True,
    type=click.Choice(("debug", "info", "warning", "error")),
)
def up(
    nodes: int,
    s3_url: str | None,
    *,
    minio: bool,
    data: Path,
    listen: str,
    node_host: str,
    slots: int,
    log_level: str,
) -> None:
    """Run a gateway and nodes on this machine, ready to build.

    \b
    Examples:
      offload-builder up
      offload-builder up --nodes 2 --minio --data ./data
    """
    from offload_core.logs import configure_logs

    if minio and s3_url:
        raise ConfigError("--minio and --s3 exclude each other; give one of them")
    if os.geteuid() != 0:
        raise ConfigError("nodes run BuildKit, which needs root; run this command with sudo")
    configure_logs(log_level)
    pool = Pool(nodes, data.resolve(), listen, node_host, slots, log_level)
    asyncio.run(run_until_signal(pool.run(s3_url, minio=minio)))


class Pool:
    """Everything that `up` starts."""

    def __init__(
        self, nodes: int, data: Path, listen: str, node_host: str, slots: int, log_level: str
    ) -> None:
        self._nodes = nodes
        self._data = data
        self._listen = listen
        self._node_host = node_host
        self._slots = slots
        self._log_level = log_level

    async def run(self, s3_url: str | None, *, minio: bool) -> None:
        """Start, print what to type next, and serve until cancelled."""
        from offload_builder.datalock import DataLock
        from offload_builder.gateway.app import Gateway
        from offload_builder.gateway.config import GatewayConfig

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(DataLock(self._data, "offload-builder up"))
            storage = await self._storage(stack, s3_url, minio=minio)
            gateway = await stack.enter_async_context(
                Gateway(
                    GatewayConfig(
                        listen=self._listen,
                        data_dir=self._data / "gateway",
                        log_level=self._log_level,
                    )
                )
            )
            token = gateway.take_first_token()
            try:
                nodes = await self._start_nodes(stack, gateway, storage)
                await self._wait_attached(gateway, nodes)
            except BaseException:
                if token:
                    # It exists now and is not made again; without it nobody could log in.
                    click.echo(f"The pool did not start. Its first token, shown only now: {token}")
                raise
            self._announce(gateway, [node.name for node in nodes], storage, token)
            try:
                await asyncio.Event().wait()
            finally:
                click.echo("Stopping: running builds may end, then everything is shut down ...")

    async def _storage(
        self, stack: AsyncExitStack, s3_url: str | None, *, minio: bool
    ) -> ObjectStorage | None:
        from offload_builder.provider.process import SupervisedProcess, minio_process

        if s3_url:
            return parse_s3_url(s3_url, os.environ)
        if not minio:
            return None
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        # New keys at every start: MinIO keeps no data under them, so nothing has to be stored.
        storage = ObjectStorage(
            f"http://{address}", "offload", secrets.token_hex(10), secrets.token_hex(20)
        )
        spec = minio_process(address, self._data / "minio", storage.access_key, storage.secret_key)
        process = await stack.enter_async_context(SupervisedProcess(spec))
        await wait_for_port(address, process)
        return storage

    async def _start_nodes(
        self, stack: AsyncExitStack, gateway: Gateway, storage: ObjectStorage | None
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
                "slots": str(self._slots),
                "log_level": self._log_level,
                **(storage.node_settings() if storage else {}),
            }
            if not self._is_enrolled(name):
                settings["token"] = await gateway.create_node_token(name)
            spec = node_process(name, settings, self._data / name / "node.log", STOP_SECONDS)
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

    def _announce(
        self,
        gateway: Gateway,
        names: list[str],
        storage: ObjectStorage | None,
        token: str | None,
    ) -> None:
        shared = (
            f"{storage.endpoint}, bucket {storage.bucket}" if storage else "none (one node's disk)"
        )
        click.echo(f"Gateway       https://{gateway.address}")
        click.echo(f"Nodes         {', '.join(names)}")
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
    return ObjectStorage(f"{parts.scheme}://{parts.netloc}", bucket, access, secret, prefix)


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
