"""Checkpoints of a run: what is saved, how, and what came back."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
