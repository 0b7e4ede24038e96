"""A minio client that writes conditionally, renews ended keys, and never waits long."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import urlsplit
from weakref import WeakSet

import urllib3
from minio import Minio
from minio.error import S3Error
from minio.sse import SseKMS, SseS3

from offload_cache.s3credentials import RenewedCredentials

if TYPE_CHECKING:
    from types import TracebackType

    from minio.credentials.providers import Provider
    from minio.sse import Sse

    from offload_cache.s3config import S3Config

_KEYS_ENDED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidTokenId",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",  # MinIO knows temporary keys no more after their end
}
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # A firewall that forgets an idle connection drops what is sent on it without a word. These
    # find out before a build does.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class Retry(urllib3.Retry):
    """Repeats what a dropped connection or a 5xx ended, but never what was merely slow."""

    def increment(  # noqa: D102 - see urllib3
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        is_slow = isinstance(error, urllib3.exceptions.TimeoutError)
        if is_slow and not isinstance(error, urllib3.exceptions.NewConnectionError):
            raise cast("Exception", error)
        return super().increment(method, url, response, error, _pool, _stacktrace)


class Connections(urllib3.PoolManager):
    """Pooled connections that can be ended while threads wait for answers on them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()
        self._made: WeakSet[Any] = WeakSet()
        self._is_cut = False

    def _new_pool(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super()._new_pool(*args, **kwargs)
        make = pool._new_conn

        def new_connection() -> Any:
            with self._lock:
                if self._is_cut:
                    raise urllib3.exceptions.ClosedPoolError(pool, "the store was closed")
                connection = make()
                self._made.add(connection)
            return connection

        pool._new_conn = new_connection
        return pool

    def cut(self) -> None:
        """End all requests: a process cannot end while its threads wait for a silent store."""
        with self._lock:
            self._is_cut = True
            made = list(self._made)
        for connection in made:
            used = connection.sock
            if used is not None:
                with contextlib.suppress(OSError):
                    # Past TLS, whose own shutdown is not for two threads.
                    socket.socket.shutdown(used, socket.SHUT_RDWR)
        self.clear()


def make_pool(
    config: S3Config, size: int, *, connect_seconds: float, read_seconds: float, attempts: int = 3
) -> Connections:
    """Return connections to the store; stores say "come back in 120 s", which no build can wait."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    context = config.tls_context()
    if context is not None and not config.verify_tls:
        # One line at the start says it; urllib3 would say it with every request.
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return Connections(
        maxsize=size,
        timeout=urllib3.Timeout(connect=connect_seconds, read=read_seconds),
        retries=Retry(
            total=attempts - 1,
            connect=min(1, attempts - 1),
            backoff_factor=0.2,
            status_forcelist=(500, 502, 503, 504),
            raise_on_status=True,
            respect_retry_after_header=False,
        ),
        socket_options=_SOCKET_OPTIONS,
        ssl_context=context,
    )


def encryption_of(config: S3Config) -> Sse | None:
    """Return what is asked for with each object that is written."""
    if config.encryption == "kms":
        return cast("Sse", SseKMS(config.kms_key, {}))
    return cast("Sse", SseS3()) if config.encryption == "s3" else None


class S3Client(Minio):
    """The client of one bucket's store over one pool of connections."""

    def __init__(self, config: S3Config, provider: Provider, pool: urllib3.PoolManager) -> None:
        url = urlsplit(config.endpoint_url)
        super().__init__(
            url.netloc,
            credentials=provider,
            secure=url.scheme == "https",
            region=config.region,
            http_client=pool,
        )
        self._encryption = encryption_of(config)
        if config.addressing == "path":
            self.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
        elif config.addressing == "virtual":
            self.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]

    def _execute(self, *args: Any, **kwargs: Any) -> Any:
        provider = self._provider
        if not isinstance(provider, RenewedCredentials):
            return super()._execute(*args, **kwargs)
        used = provider.retrieve()
        try:
            return super()._execute(*args, **kwargs)
        except S3Error as error:
            if error.code not in _KEYS_ENDED:
                raise
            provider.refuse(used)
        return super()._execute(*args, **kwargs)

    def create_object(self, bucket_name: str, object_name: str, data: bytes) -> None:
        """Write an object that does not exist.

        Raises:
            S3Error: with the code PreconditionFailed, there is one.
        """
        headers: dict[str, Any] = {
            "If-None-Match": "*",
            "Content-Type": "application/octet-stream",
            **(self._encryption.headers() if self._encryption is not None else {}),
        }
        self._put_object(bucket_name, object_name, data, headers)
