"""`offload-build bake`: several targets of one file, built together."""
