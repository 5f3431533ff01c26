"""Logprob mismatch: trainer and engine compared on the same tokens.

Where they differ, what is sampled is not what is trained.

Only tokens that the engine generated with the trainer's present weights are compared with a limit; tokens of older
weights differ because the weights do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import ScoredRollout


def mismatch_metrics(rollouts: Sequence[ScoredRollout], version: int) -> dict[str, float]:
    """Compare log-probabilities of trainer (p) and engine (q), in nats a token.

    Args:
        rollouts: those without token results are left out.
        version: of the trainer's weights.

    Returns:
        ``engine_logprob_difference``, its largest ``…_max`` and ``engine_kl`` over tokens of this version, where
        there are any; of older ones their share ``stale_tokens`` and ``stale_logprob_difference``, where there are
        any. The KL divergence KL(q‖p) is estimated by the mean of r − 1 − log r, r = p/q (never negative); it is
        unbiased for tokens sampled at temperature 1 from all tokens. NaN where a log-probability is.
    """
    fresh, stale = list[float](), list[float]()
    for rollout, differences in _differences(rollouts):
        for span in rollout.rollout.versions:
            (fresh if span.version == version else stale).extend(differences[span.start : span.end])
    metrics = {"stale_tokens": len(stale) / max(len(fresh) + len(stale), 1)}
    if fresh:
        sizes = [abs(d) for d in fresh]
        metrics["engine_logprob_difference"] = _mean(sizes)
        metrics["engine_logprob_difference_max"] = max(sizes) if all(map(math.isfinite, sizes)) else math.nan
        metrics["engine_kl"] = _mean([_exp(d) - 1 - d for d in fresh])
    if stale:
        metrics["stale_logprob_difference"] = _mean([abs(d) for d in stale])
    return metrics


def importance_metrics(rollouts: Sequence[ScoredRollout], cap: float) -> dict[str, float]:
    """Return the mean of L_seq's truncated weights min(p/q, cap), and the share truncated; empty without tokens.

    Args:
        rollouts: those with an advantage count.
        cap: of the objective.
    """
    with_advantage = [r for r in rollouts if r.advantage != 0]
    differences = [d for _, some in _differences(with_advantage) for d in some if math.isfinite(d)]
    if not differences:
        return {}
    return {
        "importance_weight": _mean([min(_exp(d), cap) for d in differences]),
        "importance_truncated": _mean([float(_exp(d) > cap) for d in differences]),
    }


def check_mismatch(metrics: Mapping[str, float], limit: float | None, where: str) -> None:
    """Refuse to go on where trainer and engine are not the same model.

    Raises:
        CordError: the mean difference is beyond the limit; with likely causes.
    """
    mean = metrics.get("engine_logprob_difference", 0.0)
    if limit is not None and mean > limit:
        raise CordError(
            f"{where}: trainer and engine differ by {mean:.3g} nats a token (largest "
            f"{metrics['engine_logprob_difference_max']:.3g}) on tokens that the engine generated with the same "
            "weights; "
            f"rollout.max_logprob_mismatch is {limit:g}. Likely causes: the engine has other weights (a weight sync "
            "that "
            "failed halfway, another checkpoint), other audio features or another prompt template, reuses audio "
            "embeddings or a prefix cache of "
            "older weights, returns log-probabilities of another temperature, or computes in a much lower precision"
        )


def _differences(rollouts: Sequence[ScoredRollout]) -> Iterator[tuple[ScoredRollout, list[float]]]:
    """Each rollout that has token results, with log p − log q of its tokens."""
    for rollout in rollouts:
        if rollout.tokens is not None:
            pairs = zip(rollout.tokens.student_logprobs, rollout.rollout.logprobs, strict=True)
            yield rollout, [p - q for p, q in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
