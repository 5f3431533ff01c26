"""Puts a run together from its configuration: what trains, what makes rollouts, what records."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
