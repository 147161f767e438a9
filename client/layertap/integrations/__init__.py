"""Adapters to other frameworks: one module each, which imports its framework and is imported only by who uses it."""
