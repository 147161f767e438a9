"""Memory that the server shares with clients on its host."""
