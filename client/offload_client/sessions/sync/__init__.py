"""The member's side of directories that containers of a session use."""
