"""Names of private networks, as a node gives them to builds: connectors carry the connections."""
