"""The gRPC edge, the only package that sees a gRPC context: service, admission, authentication, TLS."""
