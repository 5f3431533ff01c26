"""Rollout: requests and responses, when they are generated, and the engines that generate them."""
