"""Docker engines of sessions: each with namespaces, a disk, groups and users of its own."""
