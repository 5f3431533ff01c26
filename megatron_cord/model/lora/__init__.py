"""LoRA: which matrices, one matrix's branch, and all branches of a model."""
