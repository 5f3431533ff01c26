"""Warm-up of a new adapter from recordings and transcripts, before any run."""
