"""The tiered blob store and the OCI registry over it."""
