"""The files of a run, read."""
