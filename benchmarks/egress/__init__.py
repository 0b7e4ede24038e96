"""Cases of `egress`: what the firewall of a node costs."""
