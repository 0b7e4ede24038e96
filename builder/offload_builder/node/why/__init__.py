"""Why steps of a build were not in the cache: what is kept of each build, and how two compare."""
