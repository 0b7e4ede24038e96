"""The keys that requests are signed with: fixed, or temporary and renewed in time."""

from __future__ import annotations

import re
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog
import urllib3
from minio.credentials.providers import (
    AssumeRoleProvider,
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    IamAwsProvider,
    Provider,
    StaticProvider,
    WebIdentityProvider,
)

from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from minio.credentials.credentials import Credentials

    from offload_cache.s3config import S3Config

_log = structlog.get_logger(__name__)

_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 4.0
_EARLY_SECONDS = 300.0
_EARLY_SHARE = 0.25
_RETRY_SECONDS = 15.0
_SESSION_NAME = "offload-node"
_STATUS = re.compile(r"failed with HTTP status code (\d{3})")


class RenewedCredentials(Provider):
    """Temporary keys, renewed well before they end. For any thread.

    When they cannot be renewed they are used to their end. Errors never hold what was sent: some
    services take tokens in the URL.

    Args:
        make: returns a fresh provider; asked at each renewal.
        source: who gives the keys, for people.
    """

    def __init__(self, make: Callable[[], Provider], source: str) -> None:
        self._make = make
        self._source = source
        self._lock = threading.Lock()
        self._current: Credentials | None = None
        self._renew_at = 0.0
        self._end_at = 0.0

    def retrieve(self) -> Credentials:
        """Return keys that are valid now.

        Raises:
            CacheUnavailableError: there are none.
        """
        with self._lock:
            now = time.time()
            if self._current is not None and now < self._renew_at:
                return self._current
            try:
                current = self._make().retrieve()
            except Exception as error:  # noqa: BLE001 - the providers raise whatever they met
                cause = _cause(error)
                if self._current is not None and now < self._end_at:
                    self._renew_at = min(now + _RETRY_SECONDS, self._end_at)
                    _log.warning("cache.credentials.kept", source=self._source, cause=cause)
                    return self._current
                raise CacheUnavailableError(
                    f"{self._source} gives no keys for the shared cache: {cause}"
                ) from None
            self._current = current
            self._note_end(current, now)
            return current

    def _note_end(self, current: Credentials, now: float) -> None:
        if current.expiration is None:  # a file or the environment: look again now and then
            self._renew_at, self._end_at = now + _EARLY_SECONDS, float("inf")
            return
        # minio keeps the time in UTC without saying so.
        self._end_at = current.expiration.replace(tzinfo=UTC).timestamp()
        early = min(_EARLY_SECONDS, (self._end_at - now) * _EARLY_SHARE)
        self._renew_at = self._end_at - early
        _log.info(
            "cache.credentials.renewed",
            source=self._source,
            until=datetime.fromtimestamp(self._end_at, UTC).isoformat(),
        )

    def refuse(self, refused: Credentials) -> None:
        """Hear that the store does not take these keys any more."""
        with self._lock:
            if refused == self._current:
                self._renew_at = self._end_at = 0.0


def make_provider(config: S3Config) -> Provider:
    """Return what signs the requests of a configuration."""
    if config.credentials == "keys":
        return StaticProvider(config.access_key, config.secret_key, config.session_token or None)
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_ANSWER_SECONDS),
        retries=urllib3.Retry(total=1, backoff_factor=0.2, respect_retry_after_header=False),
        ssl_context=config.tls_context(),
    )
    if config.credentials == "aws":
        return RenewedCredentials(
            lambda: ChainedProvider(
                [
                    EnvAWSProvider(),
                    AWSConfigProvider(),
                    IamAwsProvider(
                        http_client=pool,
                        region=config.region,
                        role_session_name=_SESSION_NAME,
                    ),
                ]
            ),
            "the AWS environment",
        )
    policy = config.read_session_policy() or None
    if config.credentials == "assume-role":
        return RenewedCredentials(
            lambda: AssumeRoleProvider(
                sts_endpoint=config.sts_url(),
                access_key=config.access_key,
                secret_key=config.secret_key,
                policy=policy,
                region=config.region,
                role_arn=config.role_arn or None,
                role_session_name=_SESSION_NAME,
                external_id=config.external_id or None,
                http_client=pool,
            ),
            f"the STS at {config.sts_url()}",
        )
    return RenewedCredentials(
        lambda: WebIdentityProvider(
            jwt_provider_func=lambda: _read_token(config),
            sts_endpoint=config.sts_url(),
            policy=policy,
            role_arn=config.role_arn or None,
            role_session_name=_SESSION_NAME,
            http_client=pool,
        ),
        f"the STS at {config.sts_url()}",
    )


def _read_token(config: S3Config) -> dict[str, str]:
    # Read at each renewal: the platform replaces the file while the node runs.
    path = config.web_identity_token_file
    token = "" if path is None else path.read_text("utf-8").strip()
    return {"access_token": token, "expires_in": "0"}


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    if isinstance(error, urllib3.exceptions.HTTPError):
        return "no answer"
    if (match := _STATUS.search(str(error))) is not None:
        return f"HTTP status {match[1]}"
    if str(error) == "All providers fail to fetch credentials":
        return "none found in environment, credentials file or instance metadata"
    return type(error).__name__
