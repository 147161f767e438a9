"""What a model's folder says: configuration, weights, tokenizer, and how it makes sentence vectors."""
