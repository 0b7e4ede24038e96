"""What builds may reach: the policy, the firewall that holds it, the resolver that names pass."""
