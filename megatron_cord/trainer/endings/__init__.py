"""What ends a run before its last step: the clock, evaluations that are no better, a request; ranks agree on it."""
