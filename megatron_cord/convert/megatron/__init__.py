"""Megatron's distributed checkpoints, read and written without the model in memory."""
