"""Checks by which users prove their own cluster: the loss, layouts, weight sync, the environment."""
