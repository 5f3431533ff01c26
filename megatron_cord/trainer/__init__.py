"""The trainer: the run, the step, checkpoints, metrics and the rollout dump."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
