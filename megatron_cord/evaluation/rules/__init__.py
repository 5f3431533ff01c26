"""Scoring rules of published sets: the decisions that a benchmark's own evaluation code makes about a response."""
