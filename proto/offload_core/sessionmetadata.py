"""Metadata of calls to the node of a session; see offload/v1/session_node_service.proto."""

from __future__ import annotations

SESSION_KEY = "offload-session"
"""Names the session of a call."""
UNATTENDED_KEY = "offload-unattended"
"""With any value, says of an Engine call that it counts as no use whatever it carries: a program
keeps an eye on the engine with it, and nobody waits for it."""
