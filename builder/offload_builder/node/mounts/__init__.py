"""Cache mounts that move: `RUN --mount=type=cache` directories follow the builds of a project.

BuildKit keeps such a directory on one machine. Here its content is stored after a build that
worked, and is there again when a step is about to run on a node where the directory is empty.

The pieces: `gate` hears of every step before it runs, `bundle` and `naming` find out which cache
mounts it has, `tree`, `packing` and `unpacking` are the format, `worker` runs them in a process of
their own, `library` finds and publishes documents, `restoring` and `keeping` do the two halves of
the work, and `service` ties them to one daemon.
"""
