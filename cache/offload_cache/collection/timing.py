"""The times that collection rests on, in seconds; docs/cache.md, "Collection", says why."""

from __future__ import annotations

from typing import Final

REQUEST_SECONDS: Final = 900.0
"""No request is carried out later than this after it was sent: it is done by then, or never."""

MIN_GRACE_SECONDS: Final = 3600.0
"""Nothing younger is deleted, nor what was removed a shorter time ago."""

LEASE_SECONDS: Final = 3600.0
"""A lease counts for so long after the store took it; its owner trusts it REQUEST_SECONDS less."""

LEASE_RENEW_SECONDS: Final = 600.0

UPLOAD_TRUST_SECONDS: Final = MIN_GRACE_SECONDS / 2
"""What was uploaded may be relied upon for so long without a look: it is younger than any grace."""

CONDEMNED_SECONDS: Final = 1800.0
"""A list of condemned blobs counts for so long; deletions end REQUEST_SECONDS before."""

CONDEMNED_RENEW_SECONDS: Final = 300.0

CONDEMNED_WAIT_SECONDS: Final = 15.0
"""Between two looks of a publication at the lists that name its blobs."""

LOCK_SECONDS: Final = 600.0
LOCK_RENEW_SECONDS: Final = 120.0
LOCK_MARGIN_SECONDS: Final = 300.0
"""A holder that could not renew stops so long before the lock ends."""
