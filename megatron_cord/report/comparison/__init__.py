"""Several runs on one page: their curves laid over each other, the settings that differ, their evaluations."""
