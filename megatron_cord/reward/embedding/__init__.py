"""Embeddings of responses' texts: how alike two of them are, for `reward.terms.embedding`."""
