"""The trainer: a run and its configuration, the step, checkpoints, and what can be observed of a run."""
