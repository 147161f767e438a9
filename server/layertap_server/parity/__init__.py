"""`layertap-server parity`: compares a running server with transformers."""
