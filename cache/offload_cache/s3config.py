"""Where the bucket is, who we are there, and how it is spoken to."""

from __future__ import annotations

import json
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

CREDENTIALS = ("keys", "aws", "assume-role", "web-identity")
ADDRESSING = ("auto", "path", "virtual")
ENCRYPTION = ("", "s3", "kms")
_AWS_HOST = re.compile(r"(^|\.)amazonaws\.com(\.cn)?$")
_KEYS_NEEDED = {"keys", "assume-role"}
_MAX_POLICY_BYTES = 2_048  # AWS STS API reference, AssumeRole, "Policy"


@dataclass(frozen=True, slots=True)
class S3Config:
    """A bucket and the way to it; see docs/cache.md, "Buckets and access".

    Attributes:
        endpoint_url: "https://s3.eu-central-1.amazonaws.com" or "http://127.0.0.1:9000".
        bucket: created when it does not exist and we may.
        access_key: name of the key; for `keys` and `assume-role`.
        secret_key: never printed.
        region: given to the signature; "us-east-1" suits MinIO.
        prefix: of all keys, for several pools in one bucket.
        session_token: belongs to temporary keys; never printed.
        credentials: one of `CREDENTIALS`.
        role_arn: the role to take on; MinIO needs none.
        sts_endpoint: where temporary keys come from; AWS's own for AWS, else `endpoint_url`.
        external_id: what the role's trust policy asks for.
        session_policy: JSON file with a policy that narrows the role.
        web_identity_token_file: file with the token of an OIDC issuer.
        addressing: one of `ADDRESSING`.
        ca_file: PEM file with the authorities that sign the store's certificate.
        verify_tls: False takes any certificate.
        encryption: one of `ENCRYPTION`, asked for with each object.
        kms_key: name or ARN of the key for `kms`.
        connect_seconds: longest wait for a connection.
        read_seconds: longest wait for the first or next byte of what a build may wait for.
        write_seconds: the same for uploads, which nobody waits for.
    """

    endpoint_url: str
    bucket: str
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    region: str = "us-east-1"
    prefix: str = ""
    session_token: str = field(default="", repr=False)
    credentials: str = "keys"
    role_arn: str = ""
    sts_endpoint: str = ""
    external_id: str = field(default="", repr=False)
    session_policy: Path | None = None
    web_identity_token_file: Path | None = None
    addressing: str = "auto"
    ca_file: Path | None = None
    verify_tls: bool = True
    encryption: str = ""
    kms_key: str = ""
    connect_seconds: float = 2.0
    read_seconds: float = 4.0
    write_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: with the option of the node's configuration and what is allowed.
        """
        self._check_url("s3_endpoint", self.endpoint_url)
        if self.sts_endpoint:
            self._check_url("s3_sts_endpoint", self.sts_endpoint)
        for name, value, allowed in (
            ("s3_credentials", self.credentials, CREDENTIALS),
            ("s3_addressing", self.addressing, ADDRESSING),
            ("s3_encryption", self.encryption, ENCRYPTION),
        ):
            if value not in allowed:
                known = ", ".join(item or '""' for item in allowed)
                raise ConfigError(f'{name} "{value}" is unknown; use one of {known}')
        self._check_identity()
        if self.encryption == "kms" and not self.kms_key:
            raise ConfigError('s3_encryption "kms" needs s3_kms_key')
        if self.encryption == "kms" and not self.is_tls:
            raise ConfigError('s3_encryption "kms" needs an s3_endpoint with https')
        if self.kms_key and self.encryption != "kms":
            raise ConfigError('s3_kms_key needs s3_encryption "kms"')
        if self.addressing == "virtual" and self.is_tls and "." in self.bucket:
            raise ConfigError(
                's3_addressing "virtual" cannot work with https and a dot in s3_bucket, because '
                "certificates cover one level of names only"
            )
        if self.ca_file is not None and not self.verify_tls:
            raise ConfigError("s3_ca says nothing while s3_verify_tls is off; set one of them")
        self.tls_context()

    @staticmethod
    def _check_url(name: str, text: str) -> None:
        url = urlsplit(text)
        try:
            valid = url.scheme in {"http", "https"} and url.hostname and url.port != 0
        except ValueError:
            valid = False
        if not valid or url.path.strip("/") or url.query or url.fragment:
            raise ConfigError(f"{name} is no URL of the form https://HOST[:PORT] without a path")
        if url.username is not None or url.password is not None:
            raise ConfigError(f"{name} must not hold credentials; set the keys on their own")

    def _check_identity(self) -> None:
        has_keys = bool(self.access_key and self.secret_key)
        if self.credentials in _KEYS_NEEDED and not has_keys:
            raise ConfigError(
                "s3_endpoint needs s3_access_key and s3_secret_key as well, "
                'or s3_credentials "aws" or "web-identity"'
            )
        if self.credentials not in _KEYS_NEEDED and (self.access_key or self.secret_key):
            raise ConfigError(f's3_access_key has no use with s3_credentials "{self.credentials}"')
        if self.session_token and self.credentials != "keys":
            raise ConfigError('s3_session_token needs s3_credentials "keys"')
        if self.credentials == "web-identity" and self.web_identity_token_file is None:
            raise ConfigError('s3_credentials "web-identity" needs s3_web_identity_token_file')
        for name, value, kinds in (
            ("s3_role_arn", self.role_arn, {"assume-role", "web-identity"}),
            ("s3_sts_endpoint", self.sts_endpoint, {"assume-role", "web-identity"}),
            ("s3_external_id", self.external_id, {"assume-role"}),
            ("s3_session_policy", self.session_policy, {"assume-role", "web-identity"}),
            ("s3_web_identity_token_file", self.web_identity_token_file, {"web-identity"}),
        ):
            if value and self.credentials not in kinds:
                needed = " or ".join(f'"{kind}"' for kind in sorted(kinds))
                raise ConfigError(f"{name} needs s3_credentials {needed}")
        self.read_session_policy()

    @property
    def is_tls(self) -> bool:
        """Whether the store is spoken to over TLS."""
        return urlsplit(self.endpoint_url).scheme == "https"

    @property
    def is_aws(self) -> bool:
        """Whether this is AWS's own service."""
        return bool(_AWS_HOST.search(urlsplit(self.endpoint_url).hostname or ""))

    def sts_url(self) -> str:
        """Return where temporary keys are asked for."""
        if self.sts_endpoint:
            return self.sts_endpoint
        if not self.is_aws:
            return self.endpoint_url
        suffix = ".cn" if self.region.startswith("cn-") else ""
        return f"https://sts.{self.region}.amazonaws.com{suffix}"

    def read_session_policy(self) -> str:
        """Return the policy that narrows the role, as compact JSON; empty for none.

        Raises:
            ConfigError: the file cannot be read or is no policy.
        """
        path = self.session_policy
        if path is None:
            return ""
        try:
            policy = json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read s3_session_policy {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"s3_session_policy {path} is no JSON") from error
        if not isinstance(policy, dict) or "Statement" not in policy:
            raise ConfigError(f's3_session_policy {path} has no "Statement"')
        text = json.dumps(policy, separators=(",", ":"))
        if len(text) > _MAX_POLICY_BYTES:
            raise ConfigError(
                f"s3_session_policy {path} has more than {_MAX_POLICY_BYTES} characters"
            )
        return text

    def tls_context(self) -> ssl.SSLContext | None:
        """Return how the store's certificate is checked; None without TLS.

        Raises:
            ConfigError: the file with authorities cannot be read.
        """
        if not self.is_tls and urlsplit(self.sts_url()).scheme != "https":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError as error:
            raise ConfigError(f"s3_ca {self.ca_file} holds no certificates in PEM form") from error
        except OSError as error:
            raise ConfigError(f"cannot read s3_ca {self.ca_file}: {error.strerror}") from error
        if not self.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
