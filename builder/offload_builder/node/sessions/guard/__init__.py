"""What stands between the members of a session and the API of its engine."""
