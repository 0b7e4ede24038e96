"""Sessions on this machine: docker engines on nodes behind sockets of the user's own."""
