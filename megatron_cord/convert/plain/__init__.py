"""A checkpoint as a plain model in one process, and how the Megatron model is compared with it."""
