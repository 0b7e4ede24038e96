"""One build on several nodes: a part ("leg") per node for the platforms that are native there."""
