"""Which sample comes when: sets in turn, each in its own order, and what stands in for damaged samples."""
