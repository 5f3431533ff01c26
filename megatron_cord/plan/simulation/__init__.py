"""A step of many GPUs in seconds, from what a trace counted and a table of rates."""
