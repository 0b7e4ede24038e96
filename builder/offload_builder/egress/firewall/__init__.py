"""The node's firewall: a network namespace per BuildKit, and one router that all of them pass."""
