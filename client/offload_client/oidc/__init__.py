"""Logging in with an identity provider: pipelines without stored secrets, people in a browser."""
