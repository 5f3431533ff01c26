"""LoRA adapters outside of Megatron: as a stream of tensors, as a PEFT directory, and merged with their base."""
