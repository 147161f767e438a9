"""Memory that a server on the same host shares with this client."""
