"""The local engine: transformers in the process of the trainer."""
