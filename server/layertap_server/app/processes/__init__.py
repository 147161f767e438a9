"""Several processes of one server on one port: a supervisor, a fork server, and those that serve."""
