"""Hugging Face checkpoint directories: tensors by their published names, what lies beside them, and the model card."""
