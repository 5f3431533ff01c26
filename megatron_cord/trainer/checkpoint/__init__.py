"""Checkpoints of a run: what is saved, how, and what came back."""
