"""A teacher that is moved away from what it would say on another view: contrastive distillation.

    log q(v) ∝ log p_A(v) + α (log p_A(v) − log p_B(v))

p_A and p_B are the teacher's distributions on its own view and on the one that it is contrasted with; with α = 1 and B
without the recording it is RT-OPD's teacher (arXiv 2609.28778). Every log p is a logit minus a constant of the token,
and the softmax that makes q drops constants: q is the softmax of z_A + α (z_A − z_B). Both passes have one output
weight W, and z = W h is linear, so these are the logits of the hidden state h_A + α (h_A − h_B). The mixture therefore
costs no product more than a plain teacher, never has logits of its own, and is exact on any shards of the vocabulary.

Shapes: N tokens, H hidden.
"""

from __future__ import annotations

from torch import Tensor


def contrasted_hidden(hidden: Tensor, other: Tensor, alpha: float) -> Tensor:
    """Return h_A + α (h_A − h_B), [N, H], in the type of h_A: the very h_A where both are equal.

    It is summed in fp32 at least and rounded once, as a hidden state is when a layer writes it.

    Args:
        hidden: [N, H], h_A, of the teacher's own view.
        other: [N, H], h_B, of the view that it is contrasted with.
        alpha: α ≥ 0; 0 leaves the teacher as it is.
    """
    exact = hidden if hidden.itemsize >= 4 else hidden.float()
    return (exact + alpha * (exact - other.to(exact.dtype))).to(hidden.dtype)


def contrast_gate(logprob: Tensor, other: Tensor, threshold: float) -> Tensor:
    """Return 1 for tokens on which the two views disagree, |log p_A(y) − log p_B(y)| > threshold, and 0 for others.

    Args:
        logprob: [N], log p_A of the response's tokens, nats.
        other: [N], log p_B of them.
        threshold: nats.

    Returns:
        [N], dtype of ``logprob``. A token of which a log-probability is NaN counts, so that the loss shows it.
    """
    return (~((logprob - other).abs() <= threshold)).to(logprob.dtype)
