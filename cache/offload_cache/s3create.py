"""Creating an object that must not exist yet: with conditional writes, or as well as one can.

Source: Amazon S3 user guide, "How to prevent object overwrites with conditional writes".
"""

from __future__ import annotations

import time
from io import BytesIO
from typing import TYPE_CHECKING

from minio.error import InvalidResponseError, S3Error

from offload_cache.s3failures import MISSING, NO_SUCH_FEATURE

if TYPE_CHECKING:
    from minio.sse import Sse

    from offload_cache.s3client import S3Client

SETTLE_SECONDS = 2.0
_CONFLICT_PAUSE_SECONDS = 0.1
_CONFLICT_ATTEMPTS = 5


class ObjectCreator:
    """Creates objects in one bucket. Blocking, for any thread.

    Stores that know conditional writes (AWS, MinIO, versitygw, newer Ceph) decide at once who was
    first. With others it is: look, write, wait, read back. Of two callers within the wait the one
    that wrote last wins; only a caller whose write is on its way for longer than the wait can win
    beside another. Some stores ignore the condition without a word: so the first object that is
    created is written a second time, which such a store accepts.
    """

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        encryption: Sse | None = None,
        *,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._encryption = encryption
        self._settle_seconds = settle_seconds
        self._conditional: bool | None = None
        """Whether the store heeds conditions; None when that is not known yet."""

    def create(self, key: str, data: bytes) -> bool:
        """Return whether the object with this key is now ours.

        Raises:
            S3Error: the store refuses.
        """
        if self._conditional:
            return self._write_if_absent(key, data) is True
        if self._exists(key):
            return False
        written = None if self._conditional is False else self._write_if_absent(key, data)
        if written is not None:
            self._conditional = not written or self._write_if_absent(key, data) is False
            if self._conditional:
                return written
        else:
            self._conditional = False
            self._client.put_object(
                self._bucket, key, BytesIO(data), len(data), sse=self._encryption
            )
        time.sleep(self._settle_seconds)
        return self._read(key, len(data)) == data

    def _write_if_absent(self, key: str, data: bytes) -> bool | None:
        """Return whether it was written; None when the store knows no conditions."""
        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                self._client.create_object(self._bucket, key, data)
            except InvalidResponseError:
                return None
            except S3Error as error:
                if error.code == "PreconditionFailed":
                    return False
                if error.code in NO_SUCH_FEATURE:
                    return None
                if error.code != "ConditionalRequestConflict":
                    raise
                time.sleep(_CONFLICT_PAUSE_SECONDS)  # somebody else is writing it now
            else:
                return True
        return False

    def _exists(self, key: str) -> bool:
        try:
            self._client.stat_object(self._bucket, key)
        except S3Error as error:
            if error.code in MISSING:
                return False
            raise
        return True

    def _read(self, key: str, size_bytes: int) -> bytes:
        # One byte more than ours shows a longer object.
        response = self._client.get_object(self._bucket, key, length=size_bytes + 1)
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()
