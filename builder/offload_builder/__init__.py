"""The service side: gateway, nodes and their BuildKit."""
