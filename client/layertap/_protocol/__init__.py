"""Requests and answers without any I/O: arguments in, protobuf out; protobuf in, results out."""
