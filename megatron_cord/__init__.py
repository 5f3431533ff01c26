"""megatron_cord: closes the gap between what a speech LLM reads and what it hears (CORD, on Megatron-Core)."""

__version__ = "0.1.0"
