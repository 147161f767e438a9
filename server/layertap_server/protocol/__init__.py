"""Between protobuf and the server's own types: requests are checked and resolved, rows become messages."""
