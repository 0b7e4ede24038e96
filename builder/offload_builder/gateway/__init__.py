"""The control plane: identity, admission, scheduling, history and the relay."""
