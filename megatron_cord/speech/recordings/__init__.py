"""A user's recordings, from rows, saved and published sets, lhotse cuts and other webdatasets, as shards."""
