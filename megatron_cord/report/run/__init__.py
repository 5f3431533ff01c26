"""Reading of a run's directory."""
