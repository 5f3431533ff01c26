"""Rewards of how alike two modalities' responses are (TARS): in the model's layers, and in an embedding of texts."""
