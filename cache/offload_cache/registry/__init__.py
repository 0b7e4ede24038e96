"""The OCI distribution registry through which BuildKit meets the blob store."""

from offload_cache.registry.grants import Exported, Grant, Registry
from offload_cache.registry.server import RegistryServer
from offload_cache.registry.sessions import UploadLimits

__all__ = ["Exported", "Grant", "Registry", "RegistryServer", "UploadLimits"]
