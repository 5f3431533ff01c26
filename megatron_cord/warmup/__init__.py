"""Warm-up of a new adapter from recordings and transcripts; the language model is neither loaded nor run."""
