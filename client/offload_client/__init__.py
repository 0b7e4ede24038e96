"""The command line side: offload-build and offload."""
