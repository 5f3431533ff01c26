"""From hidden states to the divergence and its gradients: three implementations.

They differ in what they keep until the backward pass.

``recompute`` is the shortest and keeps nothing; ``cached_grad`` keeps the divergence's gradient of the logits;
``fused`` evaluates the loss and forms all gradients in the forward pass. ``choice`` resolves "auto".
"""
