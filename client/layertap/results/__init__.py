"""What the client returns: arrays with the names and shapes of transformers, and their forms in other libraries."""
