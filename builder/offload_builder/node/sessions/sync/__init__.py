"""The node's side of directories that members and their sessions share."""
