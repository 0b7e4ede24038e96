"""Bring the image of a build into the user's container engine, moving only what it lacks.

`loader.load_image` is the entry. Engines whose images live in overlay2 and the like get a partial
docker-archive (`graphdriver`), engines with containerd's store pull from a registry that this
process serves on loopback (`containerd`, `registry`), and where they cannot reach it they get an
OCI layout (`ocilayout`). Which of these is chosen is seen from the engine, never configured.
"""
