"""The connector: builds of a project reach hosts of the network that this process is in."""
