"""The node agent: one BuildKit per project, the build service, and the link to the gateway."""
