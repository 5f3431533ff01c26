"""A step of the configured run without memory and arithmetic: the real code on fake tensors and fake process groups."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
