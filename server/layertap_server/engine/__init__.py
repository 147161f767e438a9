"""The model on its device: batches in, layers out. The only package with torch in it."""
