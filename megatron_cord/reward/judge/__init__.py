"""A language model as judge of two answers."""
