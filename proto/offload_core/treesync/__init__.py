"""Two copies of a directory that are kept the same, on the side of the client and of the node."""
