"""Cases of `session`: docker commands whose engine is at a node."""
