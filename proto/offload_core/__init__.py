"""Shared kernel: errors, digests, units, TLS and logging; knows neither gRPC servers nor disks."""

API_VERSION = 2
"""Version of the `offload.v1` protocol; raised when an older peer can no longer be served."""

VERSION = "0.1.0"
"""Version of this distribution; equal to the one in pyproject.toml, a test compares them."""
