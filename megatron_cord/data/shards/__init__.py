"""Shards of samples: tar files with a manifest, written and read."""
