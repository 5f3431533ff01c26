"""What computes a block of logits: ``eager`` (the reference), ``compiled``, ``triton_kernels``; and products."""
