"""The commands of `offload-builder`."""
