"""Published sets: how each writes its rows, and the rule that scores it."""
