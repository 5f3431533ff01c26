"""The trainer: the step, the optimizer, checkpoints, metrics and the record of rollouts."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
