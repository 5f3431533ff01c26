"""What a tower is built of, encoder and language model alike: attention, rotary positions, experts, fused kernels."""
