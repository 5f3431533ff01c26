"""What ends a run before its last step: the clock, evaluations, guards, a request; ranks agree on it."""
