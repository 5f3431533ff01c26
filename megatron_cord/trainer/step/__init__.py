"""One optimizer step: batches, teacher, objective, update."""

import megatron_cord.parallel  # noqa: F401 (makes megatron.core, which the modules here import first, usable without CUDA)
