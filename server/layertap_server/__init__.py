"""The layertap server: a BERT that hands out every layer over gRPC."""
