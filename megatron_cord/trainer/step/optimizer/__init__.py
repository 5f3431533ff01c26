"""The optimizer: its configuration, parameter groups, learning rates, and how Megatron's wrappers are put around it."""
