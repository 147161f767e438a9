"""The queue: calls in, batches for free instances out. Knows no torch, no gRPC and no protobuf."""
